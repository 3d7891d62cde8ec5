"""Transforms: torchvision v2 on uint8 images, one by one; normalisation on whole batches, where it is cheap."""

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from repvgg.data import Images
from repvgg.files import Preprocessing


def eval_transform(preprocessing: Preprocessing) -> nn.Module:
    """uint8 [C, H, W] of any size -> uint8 of the input size."""
    transform: nn.Module = v2.Compose([fit(preprocessing), v2.CenterCrop(preprocessing.input_size[1:])])
    return transform


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [N, C, H, W] -> float32, mean 0 and deviation 1 on the training set."""
    mean, std = ([255 * x for x in values] for values in (preprocessing.mean, preprocessing.std))
    normalised: Tensor = v2.functional.normalize(images.float(), mean, std)
    return normalised


def fit(preprocessing: Preprocessing) -> nn.Module:
    """Resize the short side."""
    mode = InterpolationMode(preprocessing.interpolation)
    resize: nn.Module = v2.Resize(preprocessing.resize, interpolation=mode, antialias=True)
    return resize


class Transformed:
    """Images through a transform. Its randomness is a function of seed, epoch and index alone, whatever process runs it."""

    def __init__(self, images: Images, transform: nn.Module, seed: int = 0) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by worker processes that live on

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(hash((self.seed, int(self.epoch), index)) % 2**63)
        try:
            return self.transform(image), label
        finally:
            torch.set_rng_state(before)
