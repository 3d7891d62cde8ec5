"""Flags that several commands share, each written once; and what they stand for."""

import os
import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from repvgg import terminal
from repvgg.train.recipes import Augmentation, Machine, Optimization, Recipe, Schedule

if TYPE_CHECKING:
    from repvgg.models.views import Views

DATA = (
    "digits, a folder of class folders (or of train/ and val/ with class folders), a table.csv with path and label, "
    "cifar10[:ROOT], hf:NAME_OR_PATH, hf-stream:NAME_OR_PATH, wds:SHARDS; with masks, for a "
    "PSPNet, camvid:ROOT, cityscapes:ROOT."
)
MODEL = "A model file, a run folder, hf:USER/NAME, or a name for its pretrained weights."
Data = Annotated[str, arg(help=DATA)]
Model = Annotated[str, Positional, arg(metavar="MODEL", help=MODEL)]
Runnable = Annotated[str, Positional, arg(metavar="MODEL", help=MODEL[:-1] + "; or an exported file or its folder.")]
Images = Annotated[tuple[str, ...], Positional, arg(metavar="IMAGES", help="Files, folders and globs.")]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "int16", "int8"]


SHOWN = "Flags left out keep the recipe's values. Shown are those of the recipe named, or of light."


@dataclass(frozen=True)
class Settings:
    """Fields of the recipe, in groups. given: the names of those that were given."""

    schedule: Annotated[Schedule, arg(prefix_name=False, help=f"{Schedule.__doc__} {SHOWN}")] = field(default_factory=Schedule)
    optimization: Annotated[Optimization, arg(prefix_name=False)] = field(default_factory=Optimization)
    augmentation: Annotated[Augmentation, arg(prefix_name=False)] = field(default_factory=Augmentation)
    machine: Annotated[Machine, arg(prefix_name=False)] = field(default_factory=Machine)
    given: Suppress[tuple[str, ...]] = ()

    @classmethod
    def over(cls, recipe: Recipe, given: tuple[str, ...]) -> "Settings":
        """Return the fields of a recipe."""

        def part(kind: Any) -> Any:
            return kind(**{f.name: getattr(recipe, f.name) for f in fields(kind)})

        return cls(part(Schedule), part(Optimization), part(Augmentation), part(Machine), given)

    @property
    def changes(self) -> dict[str, Any]:
        """Return the fields that were given."""
        values = {**vars(self.schedule), **vars(self.optimization), **vars(self.augmentation), **vars(self.machine)}
        return {name: values[name] for name in self.given}


@dataclass(frozen=True)
class Where:
    """The device it runs on."""

    device: str = ""
    """cpu, cuda, cuda:1, ...; empty: a GPU if there is one."""

    def chosen(self) -> str:
        """Return the device of that name, by default the first one. Raises ValueError for one that this machine lacks."""
        from repvgg.api.opening import device_named

        return device_named(**vars(self))


@dataclass(frozen=True)
class WhereLoading(Where):
    """The device it runs on, and the processes that load its images."""

    workers: int = 0
    """Processes that load images; 0: the main one does."""


@dataclass(frozen=True)
class Draw:
    """A smaller part of the data."""

    limit: int | None = None
    """At most this many images of each split, drawn with the seed."""
    seed: int = 0
    """Seed of the draw, and of weights, order and augmentation where it trains."""
    val: float | None = None
    """Share of each class to hold out, for data without splits of its own; by default a fifth, or as in training."""


@dataclass(frozen=True)
class Engine:
    """The engine that runs the model."""

    engine: str = ""
    """auto (the fastest here) or a name, as in repvgg bench; empty: PyTorch, or the exported file's own (predict
    runs up to 32 images of a deploy form in native)."""
    precision: Precision = "fp32"
    """Precision of the engine's weights and activations."""


@dataclass(frozen=True)
class Viewing:
    """The views in which a segmentation model sees a photo."""

    slide: bool = False
    """Segmentation only: predict in overlapping windows of the training crop's size."""
    scales: str = "1"
    """Segmentation only: average over these scales of the image, with commas: 0.75,1,1.25."""
    flip: bool = False
    """Segmentation only: average with the mirrored image."""

    def views(self) -> "Views":
        from repvgg.models.views import Views

        try:
            sizes = tuple(float(scale) for scale in self.scales.split(","))
        except ValueError:
            raise ValueError(f"--scales {self.scales}: numbers with commas, as in 0.75,1,1.25") from None
        return Views(self.slide, sizes, self.flip)


@dataclass(frozen=True)
class Shape:
    """The network that is trained."""

    width: float = 1.0
    """Scale the number of channels of every layer: 0.5 for half as many."""
    small_input: bool | None = None
    """Stem and first stage at stride 1; by default for images of at most 64 pixels."""


@dataclass(frozen=True)
class Output:
    """The form of what is printed."""

    json: bool = False
    """Print JSON instead of tables."""


# As fields of a command: `where: OnDevice = field(default_factory=Where)`.
OnDevice = OmitArgPrefixes[Where]
OnDeviceLoading = OmitArgPrefixes[WhereLoading]
Drawn = OmitArgPrefixes[Draw]
ByEngine = OmitArgPrefixes[Engine]
Viewed = OmitArgPrefixes[Viewing]
Shaped = OmitArgPrefixes[Shape]
Printed = OmitArgPrefixes[Output]
WithRecipe = OmitArgPrefixes[Settings]


def listed(words: str) -> tuple[str, ...]:
    """Return "a,b" as a tuple; nothing for nothing."""
    return tuple(word.strip() for word in words.split(",")) if words else ()


def process() -> int:
    """Return which process this is of those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Print a remark to stderr, so that stdout holds results alone; nothing with -q."""
    if not terminal.quiet:
        complain(line)


def complain(line: str) -> None:
    """Print what must be read to stderr."""
    print("\n".join(map(terminal.printable, line.split("\n"))), file=sys.stderr, flush=True)
