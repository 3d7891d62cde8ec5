"""Every network that has a name, as plain data. Importable without PyTorch.

Sources: RepVGG (CVPR 2021), Tables 2, 3, 4, 5 and 8; D2se and RepVGGplus-L2pse from the official code.
"""

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Task = Literal["labels", "masks"]


@dataclass(frozen=True)
class Member:
    """Depths of stages 2 to 5 (stage 1 is the stem), the width multipliers a and b, groups of every other layer, structure."""

    depths: tuple[int, int, int, int]
    a: float
    b: float
    groups: int = 1
    squeeze_excite: bool = False
    plus: bool = False  # a RepVGGplus: its squeeze-excite comes after the ReLU; auxiliary heads in training
    residual: bool = False  # two layers and a shortcut at a time, as in ResNet-18
    block: str = "repvgg"  # unless another is asked for

    @property
    def reduction(self) -> int:
        """Return how many channels of a layer share one of its squeeze-excite's hidden ones."""
        return 4 if self.plus else 16

    def widths(self, width: float = 1.0) -> tuple[int, ...]:
        """Return the channels of the five stages: min(64, 64a), 64a, 128a, 256a, 512b (Table 2), each a multiple of `groups`."""
        a, b = self.a * width, self.b * width
        exact = (min(64, 64 * a), 64 * a, 128 * a, 256 * a, 512 * b)
        return tuple(max(1, round(channels / self.groups)) * self.groups for channels in exact)

    def layer_widths(self, width: float = 1.0) -> list[int]:
        """Return the channels of every layer, the stem first."""
        return [channels for depth, channels in zip((1, *self.depths), self.widths(width), strict=True) for _ in range(depth)]


@dataclass(frozen=True)
class Plan:
    """A PSPNet's backbone by its name, and whether only the backbone's last layers dilate."""

    backbone: str
    fast: bool = False


@dataclass(frozen=True)
class Baseline:
    """A comparator: timm's name, the side of its square input in the paper, and whether its bottlenecks are those of v1."""

    timm_name: str
    input_size: int = 224
    v1: bool = False


A, B = (2, 4, 14, 1), (4, 6, 16, 1)
FAMILY: dict[str, Member] = {
    "repvgg_a0": Member(A, 0.75, 2.5),
    "repvgg_a1": Member(A, 1, 2.5),
    "repvgg_a2": Member(A, 1.5, 2.75),
    "repvgg_b0": Member(B, 1, 2.5),
    "repvgg_b1": Member(B, 2, 4),
    "repvgg_b1g2": Member(B, 2, 4, groups=2),
    "repvgg_b1g4": Member(B, 2, 4, groups=4),
    "repvgg_b2": Member(B, 2.5, 5),
    "repvgg_b2g2": Member(B, 2.5, 5, groups=2),
    "repvgg_b2g4": Member(B, 2.5, 5, groups=4),
    "repvgg_b3": Member(B, 3, 5),
    "repvgg_b3g2": Member(B, 3, 5, groups=2),
    "repvgg_b3g4": Member(B, 3, 5, groups=4),
    "repvgg_d2se": Member((8, 14, 24, 1), 2.5, 5, squeeze_excite=True),
    "repvgg_l2pse": Member((8, 14, 24, 1), 2.5, 5, squeeze_excite=True, plus=True),
    # Beyond the paper: small enough to train on a CPU in minutes.
    "repvgg_micro": Member((2, 2, 4, 1), 0.5, 0.5),
    "repvgg_mini": Member((1, 2, 3, 1), 0.75, 0.5),  # shallower and wider: small images in the same time, more accurately
}
# What is built from a member's numbers: the family; and Table 7's "residual reorganisation", which is no RepVGG.
NETWORKS: dict[str, Member] = {
    **FAMILY,
    "repvgg_b0_residual": replace(FAMILY["repvgg_b0"], residual=True, block="plain"),
}
PSPNETS: dict[str, Plan] = {
    **{f"pspnet_{name}{'_fast' if fast else ''}": Plan(name, fast) for name in FAMILY for fast in (False, True)},
    **{f"pspnet_{name}": Plan(name) for name in ("resnet18", "resnet50", "resnet101")},
}
BASELINES: dict[str, Baseline] = {
    "resnet18": Baseline("resnet18"),
    "resnet34": Baseline("resnet34"),
    "resnet50": Baseline("resnet50", v1=True),
    "resnet101": Baseline("resnet101", v1=True),
    "resnet152": Baseline("resnet152", v1=True),
    "vgg16": Baseline("vgg16"),
    "vgg16_bn": Baseline("vgg16_bn"),  # the paper's comparator: plain, with batch norm, as RepVGG's layers have
    "resnext50_32x4d": Baseline("resnext50_32x4d"),
    "resnext101_32x4d": Baseline("resnext101_32x4d"),
    "efficientnet_b0": Baseline("efficientnet_b0"),
    "efficientnet_b3": Baseline("efficientnet_b3", input_size=300),
    "regnetx_032": Baseline("regnetx_032"),
    "regnetx_120": Baseline("regnetx_120"),
}


# What comes with the package, trained: the data set that it learnt, and its file beside this one.
EMBEDDED = {"cifar10": Path(__file__).with_name("cifar10.safetensors")}


def embedded(name: str) -> Path | None:
    """Return the file of a model that comes with the package; None for any other, and where a file or run folder has the name."""
    own = Path(name).is_file() or (Path(name) / "best.safetensors").is_file() if name in EMBEDDED else True
    return None if own else EMBEDDED[name]


def in_run_folder(path: str | os.PathLike[str]) -> Path:
    """Return the best model of a run folder; any other path as it is."""
    best = Path(path) / "best.safetensors"
    return best if os.path.isfile(best) else Path(path)  # noqa: PTH113 - Path.is_file raises for names that are too long


def list_models() -> list[str]:
    """Return the names that `create_model` knows: the family first, then PSPNets, then the paper's comparators."""
    return [*NETWORKS, *PSPNETS, *BASELINES]


def resolve_name(name: str) -> str:
    """Return a model's name in our spelling ("RepVGG-A0" is "repvgg_a0"). Raises ValueError, listing the close ones."""
    ours = name.lower().replace("-", "_")
    if ours in list_models():
        return ours
    close = difflib.get_close_matches(ours, list_models(), n=4, cutoff=0.5)
    raise ValueError(f"no model {name!r}: " + (f"did you mean {', '.join(close)}?" if close else "see repvgg info"))


def task_of(name: str | None) -> Task:
    """Return what a network of this name gives for an image: labels, or masks."""
    return "masks" if name in PSPNETS else "labels"
