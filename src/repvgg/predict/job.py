"""Words and results of a prediction of a whole data set."""

from dataclasses import dataclass

from repvgg.models.views import WHOLE, Views


@dataclass(frozen=True)
class Job:
    """Flags of `repvgg predict --data`; see its help. Raises ValueError for what makes no sense."""

    model: str
    data: str
    out: str
    split: str = "val"
    engine: str = ""
    precision: str = "fp32"
    batch_size: int = 32
    top: int = 5
    part_size: int = 1024
    views: Views = WHOLE
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.top < 1:
            raise ValueError("--batch-size and --top are at least 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers}: at least 0")


@dataclass(frozen=True)
class Summary:
    """Contents of a folder of predictions. images: rows; errors: those of them that could not be read. here: images that this run
    predicted, in `seconds`."""

    out: str
    parts: int
    images: int
    errors: int
    here: int
    seconds: float
