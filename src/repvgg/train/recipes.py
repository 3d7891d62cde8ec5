"""Recipes: how to train, as plain data. Importable without PyTorch.

auto            chosen for the images and the machine at hand (see auto.py)
light, heavy    the paper's (section 4.1), for ImageNet
cifar           small images, on a CPU or one GPU
finetune        on from trained weights
pspnet          masks: the paper's (Table 8), for Cityscapes
camvid          masks: a small set, on a CPU or one GPU, from scratch
demo            the embedded digits, in a minute
"""

import difflib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from repvgg.disk import read_text


@dataclass(frozen=True)
class Schedule:
    """The length of a training, and its steps."""

    epochs: int = 120
    """Passes over the training images."""
    batch_size: int = 256
    """Images a step, of all processes and parts together."""
    accumulate: int = 1
    """Parts to split a process's images of a step into, to save memory."""
    early_stop: int = 0
    """Stop after this many epochs without a better one; 0: never."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero; at most half of the run."""
    decay: Literal["cosine", "linear", "poly"] = "cosine"
    """Fall of the learning rate to 0; poly: (share of the run left)^0.9."""


@dataclass(frozen=True)
class Optimization:
    """The optimizer, its learning rates and the loss."""

    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """SGD with momentum, as in the paper; AdamW, whose learning rate is nearer 0.001; Muon for kernels, with SGD for all else."""
    lr: float = 0.1
    """Peak learning rate."""
    lr_per: int = 0
    """Batch size that `lr` is meant for; `lr` is scaled by batch_size / lr_per. 0: never scaled."""
    kernel_lr: float = 0.02
    """Muon's peak learning rate: the angle in radians by which a step turns a kernel."""
    momentum: float = 0.9
    """Momentum of SGD and Muon, or the first beta of AdamW."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 1e-4
    """Decay of convolution and classifier kernels; of no biases, no batch norms but with --decay-identity, nor Muon's kernels."""
    custom_l2: bool = False
    """Decay the kernels that blocks fold to, as the official code does, instead of those of their branches."""
    decay_identity: bool = False
    """Decay the weights of identity branches' batch norms too, which are kernels once folded, as the official README advises."""
    clip_norm: float = 0.0
    """Clip gradients to this norm; 0: off."""
    head_lr: float = 1.0
    """Learning rate of what comes after the backbone, as a multiple of the backbone's."""
    bn_bias_lr: float = 1.0
    """Learning rate of batch norms' biases, as a multiple of their layer's; where epochs are few, well above 1 (Jordan 2024)."""
    layer_decay: float = 1.0
    """Learning rate of a stage as a share of the next one's; the head's is full."""
    frozen_stages: int = 0
    """Number of first stages to freeze; the stem is the first."""
    freeze_bn: bool = False
    """Batch norms keep their running statistics, and use them."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is what is evaluated and kept; 0: none."""
    whiten: bool = False
    """Start a new network's first layer as a whitening of the images' patches (Jordan 2024); meant for small images."""
    label_smoothing: float = 0.0
    """Share of each target spread over all classes."""
    auxiliary: float = 0.4
    """Weight of the loss of each auxiliary head, of a PSPNet or a RepVGGplus; the authors of RepVGGplus used 0.1."""


@dataclass(frozen=True)
class Augmentation:
    """The changes to an image before the network sees it."""

    image_size: int = 0
    """Height and width of images in training and testing; 0: what suits the data, or the model to start from."""
    crop: Literal["random_resized", "shift", "scale"] = "random_resized"
    """random_resized: random size and shape. shift: by up to `shift`. scale (masks): from 0.5 to 2, then a crop."""
    shift: float = 0.125
    """Longest shift, as a share of the image's longer side."""
    border: Literal["black", "reflected"] = "black"
    """What a shift brings in from outside the image: black, or the image reflected."""
    crop_area: float = 0.08
    """Smallest share of the image in a random_resized crop."""
    crop_size: int = 0
    """Side of the crop of masks, or that of the image if it is shorter; 0: the whole image."""
    resize: int = 0
    """Short side that photos with masks are resized to; 0: as they are."""
    jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation, in photos with masks."""
    flip: bool = True
    """Mirror half of the images."""
    small_first: float = 0.0
    """Share of the run, from its start, with images at three quarters of their size; a step then takes six tenths of the time."""
    auto_augment: bool = False
    """AutoAugment's ImageNet policy (Cubuk et al. 2019)."""
    rand_augment: int = 0
    """Strength of RandAugment (Cubuk et al. 2020), up to 30, 9 being usual; 0 is off."""
    erasing: float = 0.0
    """Share of the images that lose a random rectangle (Zhong et al. 2020)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019); 0 is off. With mixup, each step takes one of the two."""


@dataclass(frozen=True)
class Machine:
    """Precision and other ways to compute."""

    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16, fp16: autocast; weights and optimizer stay in fp32. fp64: all of it."""
    channels_last: bool = True
    """Memory format NHWC."""
    compile: bool = False
    """torch.compile the training step. It takes a minute at the start; img/s tells whether the steps are faster then."""
    checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again in the backward pass: less memory, a third more time."""
    sync_bn: bool = False
    """Batch norm over the images of all processes (GPUs only)."""


@dataclass(frozen=True)
class Recipe(Machine, Augmentation, Optimization, Schedule):
    """Settings of training: weight decay on kernels alone, warm-up and then a decay of the learning rate to zero at the last
    step. Its fields are those of the four classes above, in that order."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")
        for name in ("momentum", "label_smoothing", "ema", "erasing", "shift", "small_first"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: from 0 to below 1")
        never_negative = ("weight_decay", "warmup_epochs", "mixup", "cutmix", "clip_norm", "lr_per", "frozen_stages", "auxiliary")
        for name in (*never_negative, "crop_size", "resize", "jitter", "early_stop", "image_size"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: not negative")
        for name in ("lr", "kernel_lr", "head_lr", "bn_bias_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: above 0")
        if not 0 <= self.rand_augment <= 30:
            raise ValueError(f"rand_augment is {self.rand_augment}: from 0 to 30")
        for name in ("layer_decay", "crop_area"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: above 0, at most 1")
        for name, kind in get_type_hints(Recipe).items():
            if (choices := get_args(kind)) and getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: {' or '.join(choices)}")

    @property
    def peak_lr(self) -> float:
        """`lr`, scaled to the batch size if asked for."""
        return self.lr * self.batch_size / self.lr_per if self.lr_per else self.lr

    def side_at(self, side: int, progress: float) -> int:
        """Return the pixels a side of training images after `progress` (0 to 1) of all steps: where fewer, a multiple of 8."""
        return min(side, max(8, side * 3 // 32 * 8)) if progress < self.small_first else side

    def work_left(self, side: int, progress: float) -> float:
        """Return the work after `progress` (0 to 1) of all steps, as a share of what a run has that sees no smaller images."""
        small = max(0.0, self.small_first - progress)
        return 1 - progress - small * (1 - (self.side_at(side, 0.0) / side) ** 2)

    def lr_at(self, progress: float) -> float:
        """Return the learning rate after `progress` (0 to 1) of all steps."""
        warmup = min(0.5, self.warmup_epochs / self.epochs)
        if progress < warmup:
            return self.peak_lr * progress / warmup
        left = (1 - progress) / (1 - warmup)
        if self.decay == "poly":
            return self.peak_lr * math.pow(max(0.0, left), 0.9)
        return self.peak_lr * (left if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


@dataclass(frozen=True)
class Keeping:
    """Settings for saving state (always at the end of each epoch), and for a folder that already holds a run."""

    save_minutes: float = 2.0
    """Minutes between two saves."""
    save_steps: int = 0
    """Save after so many steps too; 0: only by time."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume the run in the folder. never: delete it and start over."""
    allow_change: str = ""
    """Settings that may differ from those of the resumed run, with commas: epochs,lr."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """stop: at an image that cannot be read. skip: list such images in bad_images.txt and go on without."""
    allow_deploy: bool = False
    """Allow training a model in deploy form: a plain network without batch norms."""
    wandb: str = ""
    """Project on Weights & Biases to log to as well."""
    mirror: str = ""
    """URL of a folder (s3://bucket/run). The run is copied there whenever its state is saved, and resumes from there if
    it is not in --out."""


RECIPES = {
    "light": Recipe(),
    "heavy": Recipe(epochs=200, warmup_epochs=5, label_smoothing=0.1, auto_augment=True, mixup=0.2),
    "cifar": Recipe(
        epochs=26,
        batch_size=256,
        optimizer="muon",
        lr=0.2,
        nesterov=True,
        weight_decay=1e-3,
        warmup_epochs=2,
        decay="linear",
        label_smoothing=0.2,
        ema=0.99,
        bn_bias_lr=16,
        whiten=True,
        small_first=0.6,
        crop="shift",
        shift=1 / 16,
        border="reflected",
        precision="bf16",
    ),
    "finetune": Recipe(epochs=15, batch_size=64, lr=0.02, nesterov=True, warmup_epochs=1, label_smoothing=0.1, layer_decay=0.7),
    "pspnet": Recipe(epochs=40, batch_size=16, lr=0.01, head_lr=10, decay="poly", crop="scale", crop_size=713, sync_bn=True),
    "camvid": Recipe(
        epochs=150,
        batch_size=8,
        lr=0.05,
        nesterov=True,
        weight_decay=5e-4,
        warmup_epochs=3,
        decay="poly",
        crop="scale",
        crop_size=288,
        jitter=0.3,
        precision="bf16",
    ),
    "demo": Recipe(epochs=8, batch_size=64, lr=0.1, nesterov=True, weight_decay=5e-4, warmup_epochs=1, crop="shift", flip=False),
}


# What a recipe for new networks has to be without where the network is trained already.
GENTLE: dict[str, Any] = {"optimizer": "sgd", "bn_bias_lr": 1.0, "ema": 0.0, "small_first": 0.0}


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name. Raises ValueError for an unknown one, listing those there are."""
    if name == "auto":
        raise ValueError("the recipe auto is chosen when it has seen the images and the machine, by repvgg train")
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise ValueError(f"no recipe {name!r}: " + (f"did you mean {close[0]}?" if close else ", ".join(["auto", *RECIPES])))
    return RECIPES[name]


def resolve(recipe: str | os.PathLike[str] | Recipe, **changes: Any) -> Recipe:
    """Return a recipe, the one of that name or the one in that file (.json), with some of its fields changed.

    Raises ValueError for an unknown name or field, a file that holds no recipe, and values that make none.
    """
    if not isinstance(recipe, Recipe):
        recipe = _read(Path(recipe)) if Path(recipe).suffix == ".json" else get_recipe(os.fspath(recipe))
    return replace(recipe, **_known(changes))


def _read(path: Path) -> Recipe:
    """Return the recipe in a file, such as a run folder's recipe.json; what it leaves out is as in `light`."""
    try:
        found = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: no recipe can be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: is no JSON") from None
    try:
        return Recipe(**_known(found))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no recipe ({error})") from None


def _known(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the fields as they are. Raises ValueError for one that a recipe does not have, or of another type."""
    defaults = asdict(Recipe())
    for name, value in changes.items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            raise ValueError(f"a recipe has no {name}" + (f": did you mean {close[0]}?" if close else ""))
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} is {value!r}: {kind.__name__} is needed")
    return changes


FIELDS = tuple(f.name for f in fields(Recipe))
