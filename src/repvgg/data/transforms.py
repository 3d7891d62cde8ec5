"""Transforms: torchvision v2 on uint8 images, one by one; normalisation on whole batches, where it is cheap."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from repvgg.data import Images
from repvgg.data.images import ImageError
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
    return v2.Compose([Trim(), resize])  # type: ignore[no-any-return]


class Trim(nn.Module):
    """Cut the ends off an image more than 32 times as long as wide: resized by its short side, it would fill the memory."""

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        longest = 32 * min(height, width)
        if max(height, width) <= longest:
            return image
        trimmed: Tensor = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
        return trimmed


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


def load(
    images: Transformed, batch_size: int, workers: int = 0, order: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images [N, C, H, W] and labels [N], in `order`. Raises `ImageError` for an image that cannot be read."""
    pin = torch.cuda.is_available()
    loader: Any = torch.utils.data.DataLoader(images, batch_size, sampler=order, num_workers=workers, pin_memory=pin)  # type: ignore[arg-type]
    try:
        yield from loader
    except ImageError as error:  # from a worker process it comes with the whole traceback in its message
        reason = str(error).strip().splitlines()[-1]
        raise ImageError(reason.removeprefix(f"{ImageError.__module__}.ImageError: ")) from None
