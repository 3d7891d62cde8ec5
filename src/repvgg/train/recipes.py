"""Recipes: how to train, as plain data. Importable without PyTorch.

light, heavy    the paper's (section 4.1), for ImageNet
cifar           small images, on a CPU or one GPU
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
    """Images a step."""
    lr: float = 0.1
    """Peak learning rate, for this batch size."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 1e-4
    """On the kernels of convolutions and the classifier; never on biases or batch norms."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate from zero; at most half of the run."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Its fall to zero."""
    label_smoothing: float = 0.0
    """Share of each target spread over all classes."""
    crop: Literal["random_resized", "shift"] = "random_resized"
    """A crop of random size and shape, or a shift by up to an eighth of the size."""
    flip: bool = True
    """Mirror half of the images."""
    auto_augment: bool = False
    """AutoAugment's ImageNet policy (Cubuk et al. 2019)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0 is off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights and optimizer stay in fp32."""
    channels_last: bool = True
    """Memory format NHWC."""
    compile: bool = False
    """torch.compile the training step: a minute at the start, some 30% faster steps."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: from 0 to below 1")
        for name in ("weight_decay", "warmup_epochs", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: not negative")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}: above 0")
        for name, kind in get_type_hints(Recipe).items():
            if (choices := get_args(kind)) and getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: {' or '.join(choices)}")

    def lr_at(self, progress: float) -> float:
        """Learning rate after `progress` (0 to 1) of all steps."""
        warmup = min(0.5, self.warmup_epochs / self.epochs)
        if progress < warmup:
            return self.lr * progress / warmup
        left = (1 - progress) / (1 - warmup)
        return self.lr * (left if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


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
    "demo": Recipe(epochs=8, batch_size=64, lr=0.1, nesterov=True, weight_decay=5e-4, warmup_epochs=1, crop="shift", flip=False),
}


def get_recipe(name: str) -> Recipe:
    """Raises ValueError for an unknown name, listing those there are."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise ValueError(f"no recipe {name!r}: " + (f"did you mean {close[0]}?" if close else ", ".join(RECIPES)))
    return RECIPES[name]
