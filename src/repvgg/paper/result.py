"""The parts that the paper's tables and figures share: settings to measure by, and the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.disk import Log
from repvgg.measure.machine import this_machine, threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from repvgg.deploy.engines import Options
    from repvgg.measure.timing import Ratio


BEST = "best"  # as an engine: each model's own fastest verified one


class NothingChosenError(ValueError):
    """A table or figure has nothing to show: none of the models asked for, say. Of all parts it is left out."""


@dataclass(frozen=True)
class Protocol:
    """`warmup` batches of `batch_size` images, then `rounds` rounds, in each of which a candidate has `batches` in a row."""

    batch_size: int
    rounds: int
    batches: int
    warmup: int


# By device and whether in a hurry. The paper: batch 128, 50 batches of warm-up, 50 timed.
PROTOCOLS = {
    ("cuda", False): Protocol(128, 5, 10, 50),
    ("cuda", True): Protocol(32, 3, 5, 10),
    ("cpu", False): Protocol(8, 10, 1, 2),
    ("cpu", True): Protocol(2, 3, 1, 1),
}


@dataclass(frozen=True)
class PaperSettings:
    """The settings to measure by.

    data, workers: what models are trained on, and how many processes load it. models: names as create_model takes them, none for
    all. engine: its name, "best" for each model's fastest that computes what PyTorch does, "" for each part's own choice.
    batch_size, rounds: None for those of PROTOCOLS. input_size: pixels a side, None for each model's own. weights: files or names
    of trained classifiers, whose top-1 on `data` tables 4 and 5 compute. init_backbone: those that table 8 starts from. quick:
    minutes instead of tens of minutes, and marked so. out: the folder. log: takes lines of progress.
    """

    data: str = ""
    workers: int = 0
    models: tuple[str, ...] = ()
    engine: str = ""
    precision: str = "fp32"
    batch_size: int | None = None
    input_size: int | None = None
    weights: tuple[str, ...] = ()
    init_backbone: tuple[str, ...] = ()
    rounds: int | None = None
    threads: int | None = None
    channels_last: bool = True
    device: str = "cpu"
    quick: bool = False
    out: Path = Path("paper")
    log: Log = field(default=print, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("rounds", self.rounds), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it is at least 1")

    @property
    def protocol(self) -> Protocol:
        usual = PROTOCOLS["cuda" if self.device.startswith("cuda") else "cpu", self.quick]
        return Protocol(self.batch_size or usual.batch_size, self.rounds or usual.rounds, usual.batches, usual.warmup)

    @property
    def named_engine(self) -> str:
        """The engine asked for by its name; "" where none is."""
        return "" if self.engine == BEST else self.engine

    @property
    def one_engine(self) -> str:
        """The engine of a part that runs everything in one: eager unless another is named."""
        return self.named_engine or "eager"

    @property
    def where(self) -> str:
        """The name of the GPU, or of the processor and how many threads."""
        here = this_machine(self.device)
        if self.device.startswith("cuda"):
            return str(here["gpu"])
        return f"{here['processor']}, {threads(self.threads or here['threads'])}"

    def options(self, batch_size: int) -> "Options":
        """Return the options that an engine is built with."""
        from repvgg.deploy.engines import Options

        return Options(
            batch_size=batch_size,
            precision=self.precision,
            threads=self.threads,
            channels_last=self.channels_last,
            device=self.device,
        )


@dataclass(frozen=True)
class Table:
    """Rows of cells that `str` makes readable; None is an empty one. folded: on the page, behind a line that opens it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False


@dataclass(frozen=True)
class Result:
    """A table or figure of the paper beside our own.

    how: a paragraph on how it was measured, and why: on why the two differ where they do, and where they do not. figures: to draw,
    by file name without its ending. data: everything behind the cells, for JSON.
    """

    title: str
    tables: Sequence[Table]
    why: str
    data: dict[str, Any]
    figures: dict[str, "Figure"] = field(default_factory=dict)
    how: str = ""


def interval(r: "Ratio") -> dict[str, float]:
    """Return a ratio and its interval for JSON."""
    return {"ratio": r.value, "low": r.low, "high": r.high}
