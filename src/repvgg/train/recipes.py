"""Recipes: how to train, as plain data. Importable without PyTorch.

light, heavy    the paper's (section 4.1), for ImageNet
cifar           small images, on a CPU or one GPU
finetune        on from trained weights
pspnet          masks: the paper's (Table 8), for Cityscapes
camvid          masks: a small set, on a CPU or one GPU, from scratch
demo            the embedded digits, in a minute
"""

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, weight decay on kernels alone, warm-up and then a decay of the learning rate to zero at the last step."""

    epochs: int = 120
    """Passes over the training images."""
    batch_size: int = 256
    """Images a step, of all processes and parts together."""
    accumulate: int = 1
    """Parts that a process takes its images of a step in, where memory is short."""
    lr: float = 0.1
    """Peak learning rate."""
    lr_per: int = 0
    """Images a step that `lr` is meant for: it is scaled by batch_size / lr_per. 0: never scaled."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 1e-4
    """On the kernels of convolutions and the classifier; never on biases or batch norms."""
    custom_l2: bool = False
    """Decay the kernels that blocks fold to, as the official code does, instead of those of their branches."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0: any."""
    head_lr: float = 1.0
    """Learning rate of what comes after the backbone, as a multiple of the backbone's."""
    layer_decay: float = 1.0
    """Learning rate of a stage as a share of the next one's; the head has all of it."""
    frozen_stages: int = 0
    """First stages that stay as they are; the stem is the first."""
    freeze_bn: bool = False
    """Batch norms keep their running statistics, and use them."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is what is evaluated and kept; 0: none."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate from zero; at most half of the run."""
    decay: Literal["cosine", "linear", "poly"] = "cosine"
    """Its fall to zero; poly: what is left of the run, to the power of 0.9."""
    label_smoothing: float = 0.0
    """Share of each target spread over all classes."""
    crop: Literal["random_resized", "shift", "scale"] = "random_resized"
    """A crop of random size and shape; a shift by up to an eighth of the size; of masks, a scale from 0.5 to 2 and then a crop."""
    crop_size: int = 0
    """Side of the crop of masks, or that of the image if it is shorter; 0: the whole image."""
    resize: int = 0
    """Short side that photos with masks are resized to; 0: as they are."""
    jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation, in photos with masks."""
    auxiliary: float = 0.4
    """Weight of the loss of each auxiliary head, of a PSPNet or a RepVGGplus (whose authors took 0.1)."""
    flip: bool = True
    """Mirror half of the images."""
    auto_augment: bool = False
    """AutoAugment's ImageNet policy (Cubuk et al. 2019)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0 is off."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16, fp16: autocast; weights and optimizer stay in fp32. fp64: all of it."""
    channels_last: bool = True
    """Memory format NHWC."""
    compile: bool = False
    """torch.compile the training step: a minute at the start, some 30% faster steps."""
    checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again in the backward pass: less memory, a third more time."""
    sync_bn: bool = False
    """Batch norm over the images of all processes (GPUs only)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: from 0 to below 1")
        never_negative = ("weight_decay", "warmup_epochs", "mixup", "clip_norm", "lr_per", "frozen_stages", "auxiliary")
        for name in (*never_negative, "crop_size", "resize", "jitter"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: not negative")
        for name in ("lr", "head_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: above 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}: above 0, at most 1")
        for name, kind in get_type_hints(Recipe).items():
            if (choices := get_args(kind)) and getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: {' or '.join(choices)}")

    @property
    def peak_lr(self) -> float:
        """`lr`, scaled to the batch size if asked for."""
        return self.lr * self.batch_size / self.lr_per if self.lr_per else self.lr

    def lr_at(self, progress: float) -> float:
        """Learning rate after `progress` (0 to 1) of all steps."""
        warmup = min(0.5, self.warmup_epochs / self.epochs)
        if progress < warmup:
            return self.peak_lr * progress / warmup
        left = (1 - progress) / (1 - warmup)
        if self.decay == "poly":
            return self.peak_lr * math.pow(max(0.0, left), 0.9)
        return self.peak_lr * (left if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


@dataclass(frozen=True)
class Keeping:
    """Settings of when state is saved (at the end of each epoch always), and what happens in a folder that holds a run already."""

    save_minutes: float = 2.0
    """Save the state this often."""
    save_steps: int = 0
    """And after this many steps; 0: by the clock alone."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run that is in the folder. never: start over, and lose it."""
    allow_change: str = ""
    """Settings in which it may differ from the run that it goes on with, with commas: epochs,lr."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """stop: at an image that cannot be read. skip: list such images in bad_images.txt and go on without."""
    allow_deploy: bool = False
    """Go on training a model in deploy form: a plain network without batch norms."""
    wandb: str = ""
    """Project on Weights & Biases to log to as well."""


RECIPES = {
    "light": Recipe(),
    "heavy": Recipe(epochs=200, warmup_epochs=5, label_smoothing=0.1, auto_augment=True, mixup=0.2),
    "cifar": Recipe(
        epochs=20,
        batch_size=128,
        lr=0.2,
        nesterov=True,
        weight_decay=5e-4,
        warmup_epochs=4,
        decay="linear",
        label_smoothing=0.1,
        crop="shift",
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


def get_recipe(name: str) -> Recipe:
    """Raises ValueError for an unknown name, listing those there are."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise ValueError(f"no recipe {name!r}: " + (f"did you mean {close[0]}?" if close else ", ".join(RECIPES)))
    return RECIPES[name]
