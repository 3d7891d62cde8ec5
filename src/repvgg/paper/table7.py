"""Table 7: B0's block against other structures; and RepVGG blocks in ResNet-50, when not in a hurry."""

from repvgg.paper import ablation
from repvgg.paper.agreement import FULL
from repvgg.paper.grid import RESNETS, TABLES
from repvgg.paper.result import PaperSettings, Result


def run(settings: PaperSettings) -> Result:
    variants = (FULL, *TABLES[4:], *(() if settings.quick else RESNETS))
    return ablation.part("Table 7", variants, ablation.table7, "table7", settings)
