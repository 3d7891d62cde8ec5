"""Augmentation of training images as a recipe says, by torchvision v2."""

import math

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resize

from repvgg.data.transforms import fit
from repvgg.models.manifest import Preprocessing
from repvgg.train.recipes import Recipe

RATIOS = (3 / 4, 4 / 3)  # of a random crop, width over height


def train_transform(recipe: Recipe, preprocessing: Preprocessing) -> nn.Module:
    """Return a transform from uint8 [C, H, W] of any size to uint8 of the input size, augmented as the recipe says."""
    _, height, width = preprocessing.input_size
    mode = InterpolationMode(preprocessing.interpolation)
    steps: list[nn.Module] = []
    if recipe.crop == "random_resized":
        steps.append(Crop((height, width), (recipe.crop_area, 1.0), RATIOS, mode, antialias=True))
    else:
        padding, how = shift_of(recipe, preprocessing), "reflect" if recipe.border == "reflected" else "constant"
        steps += [fit(preprocessing), v2.RandomCrop((height, width), padding, pad_if_needed=True, padding_mode=how)]
    if recipe.auto_augment:
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=mode))
    if recipe.rand_augment:
        steps.append(v2.RandAugment(magnitude=recipe.rand_augment, interpolation=mode))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.erasing:
        steps.append(v2.RandomErasing(recipe.erasing, value=[round(255 * x) for x in preprocessing.mean]))
    transform: nn.Module = v2.Compose(steps)
    return transform


class Crop(v2.RandomResizedCrop):
    """A random crop, resized; it leaves a pixel's channels side by side in memory, where resizing is fastest."""

    def transform(self, inpt: Tensor, params: dict[str, int]) -> Tensor:
        """Cut out what was drawn, and resize it."""
        top, left = params["top"], params["left"]
        rows = inpt.permute(1, 2, 0)[top : top + params["height"], left : left + params["width"]]
        crop = rows.contiguous().permute(2, 0, 1)
        resized: Tensor = resize(crop, self.size, self.interpolation, antialias=self.antialias)
        return resized


def shift_of(recipe: Recipe, preprocessing: Preprocessing) -> int:
    """Return how many pixels an image is shifted at most: fewer than either side has."""
    sides = preprocessing.input_size[1:]
    return min(int(recipe.shift * max(sides)), min(sides) - 1)


def side_of(recipe: Recipe, preprocessing: Preprocessing) -> int:
    """Return how long an image's sides must be for the smallest crop to have the input's pixels; 0 where images are not cropped."""
    if recipe.crop != "random_resized":
        return 0
    return math.ceil(max(preprocessing.input_size[1:]) / math.sqrt(recipe.crop_area * min(RATIOS)))


def mixing(recipe: Recipe, num_classes: int) -> nn.Module | None:
    """Return what mixes the images and labels of a batch as the recipe says; None where it does not."""
    kinds = ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
    found = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(found) if len(found) > 1 else found[0] if found else None


def only_shifts(recipe: Recipe) -> bool:
    """Tell whether images are shifted and mirrored and no more, which is quickly done on whole batches."""
    return recipe.crop == "shift" and not (recipe.auto_augment or recipe.rand_augment or recipe.erasing)
