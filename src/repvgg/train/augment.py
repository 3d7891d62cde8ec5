"""Augmentation of training images as a recipe says, by torchvision v2."""

from torch import nn
from torchvision.transforms import InterpolationMode, v2

from repvgg.data.transforms import fit
from repvgg.models.manifest import Preprocessing
from repvgg.train.recipes import Recipe


def train_transform(recipe: Recipe, preprocessing: Preprocessing) -> nn.Module:
    """Return a transform from uint8 [C, H, W] of any size to uint8 of the input size, augmented as the recipe says."""
    _, height, width = preprocessing.input_size
    mode = InterpolationMode(preprocessing.interpolation)
    steps: list[nn.Module] = []
    if recipe.crop == "random_resized":
        steps.append(v2.RandomResizedCrop((height, width), interpolation=mode, antialias=True))
    else:
        steps += [fit(preprocessing), v2.RandomCrop((height, width), padding=max(height, width) // 8, pad_if_needed=True)]
    if recipe.auto_augment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=mode))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    transform: nn.Module = v2.Compose(steps)
    return transform


def mixing(recipe: Recipe, num_classes: int) -> nn.Module | None:
    """Return what mixes the images and labels of a batch as the recipe says; None where it does not."""
    return v2.MixUp(alpha=recipe.mixup, num_classes=num_classes) if recipe.mixup else None
