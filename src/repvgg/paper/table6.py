"""Table 6: B0 without its identity, its 1x1, or both; trained and timed."""

from repvgg.paper import ablation
from repvgg.paper.grid import TABLES
from repvgg.paper.result import PaperSettings, Result


def run(settings: PaperSettings) -> Result:
    return ablation.part("Table 6", TABLES[:4], ablation.table6, "table6", settings)
