"""Small images kept whole on the device, and shifted, mirrored and erased there in batches: no worker is as fast as no worker.

resident = Resident.of(source.train, source.preprocessing, "cuda")       # None for what must be read image by image
images, labels = resident.batch(indices)                                 # uint8 [N, C, H, W], int64 [N]
images, labels = resident.batch(indices, Shifts(len(source.train), 4, False, flip=True, seed=(0, epoch)))
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repvgg.data import Images
from repvgg.data.images import ImageError
from repvgg.data.transforms import fit
from repvgg.models.manifest import Preprocessing

AT_ONCE = 4096  # images that are resized together
MOST_BYTES = 1 << 30  # of a split at the input's size, which is copied a few times on the way: CIFAR-10 has 150 MB
_known: Any = weakref.WeakKeyDictionary()  # the one of each split, for as long as that lives


class Shifts:
    """The shift, the mirroring and the erasing of each image of a split in one epoch: a function of seed, epoch and image alone.

    An image is mirrored in every other epoch, half of them in the first: of two epochs neither shows it twice the same way, as
    chance would (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds"). erased: top, left, bottom and right of a rectangle of each
    image [N, 4], as shares of its sides; where nothing is erased it has no pixel.
    """

    def __init__(self, count: int, most: int, reflected: bool, flip: bool, seed: tuple[int, int], erasing: float = 0.0) -> None:
        """Draw them.

        most: pixels that a shift is at most, fewer than either side has. reflected: the image comes in from outside, not black.
        seed: of the run, and the number of the epoch. erasing: the share of images of which a rectangle is erased.
        """
        self.reflected = reflected
        run, epoch = seed
        random = torch.Generator().manual_seed(hash(seed) % 2**63)
        self.top, self.left = torch.randint(0, 2 * most + 1, (2, count), generator=random) - most
        at_first = torch.rand(count, generator=torch.Generator().manual_seed(run)) < 0.5
        self.mirrored = (at_first ^ bool(epoch % 2)) & flip
        self.erased = _rectangles(count, erasing, random) if erasing else None

    def to(self, device: str) -> "Shifts":
        """Move them to a device."""
        self.top, self.left, self.mirrored = (t.to(device, non_blocking=True) for t in (self.top, self.left, self.mirrored))
        self.erased = None if self.erased is None else self.erased.to(device, non_blocking=True)
        return self


def _rectangles(count: int, share: float, random: torch.Generator) -> Tensor:
    """Return rectangles [N, 4] as torchvision's RandomErasing draws them: 2 to 33% of the image, height 0.3 to 3.3 times width.

    A side that would be longer than the image's is as long; torchvision draws again then.
    """
    area = torch.empty(count).uniform_(0.02, 0.33, generator=random)
    ratio = torch.empty(count).uniform_(math.log(0.3), math.log(3.3), generator=random).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    sides *= (torch.rand(count, generator=random) < share)[:, None]
    first = torch.rand(count, 2, generator=random) * (1 - sides)
    return torch.cat([first, first + sides], 1)


class Resident:
    """All images of a split, of the input's size."""

    def __init__(self, pixels: Tensor, labels: Tensor, device: str, mean: Sequence[float] = (0.5,)) -> None:
        """Take the pixels, uint8 [N, C, H, W], and labels [N] to a device. mean: the colour of what is erased, 0 to 1."""
        self.count, self.channels, self.height, self.width = pixels.shape
        # A pixel is a row, with its channels in it, so that a batch is one selection of rows. The last two are black and the mean.
        black, grey = torch.zeros(2, 1, self.channels, dtype=torch.uint8)
        grey[:] = torch.tensor([round(255 * x) for x in mean])
        self.rows = torch.cat([pixels.permute(0, 2, 3, 1).reshape(-1, self.channels), black, grey]).to(device)
        self.labels, self.device = labels.to(device), device
        self.y, self.x = torch.arange(self.height, device=device), torch.arange(self.width, device=device)

    @classmethod
    def of(cls, images: Images, preprocessing: Preprocessing, device: str) -> "Resident | None":
        """Return a split at the input's size on a device; None unless it is small and its images become of one size."""
        key, known = (preprocessing, device), _known.get(images)
        if known is None or known[0] != key:
            known = _known[images] = (key, cls._made(images, preprocessing, device))
        return known[1]  # type: ignore[no-any-return]

    @classmethod
    def _made(cls, images: Images, preprocessing: Preprocessing, device: str) -> "Resident | None":
        if math.prod(preprocessing.input_size) * len(images) > MOST_BYTES:
            return None
        whole = getattr(images, "whole", None)
        try:
            found = whole() if whole else None
        except ImageError:  # it will be met again, and told, where images are read one by one
            return None
        if found is None or not len(found[1]):
            return None
        pixels, labels = found
        resize = fit(preprocessing)
        one = resize(pixels[:1])
        if one.shape[1:] != preprocessing.input_size:
            return None
        pixels = torch.cat([resize(some) for some in pixels.split(AT_ONCE)])
        return cls(pixels, torch.tensor(labels), device, preprocessing.mean)

    def batch(self, indices: Tensor, shifts: Shifts | None = None) -> tuple[Tensor, Tensor]:
        """Return the images of these indices [B], uint8 [B, C, H, W] in channels-last, and their labels [B], on the device."""
        i = indices.to(self.device, non_blocking=True)
        y, x = self.y[None].expand(len(i), -1), self.x[None].expand(len(i), -1)
        if shifts is not None:
            y = y + shifts.top[i, None]
            x = torch.where(shifts.mirrored[i, None], x.flip(1), x) + shifts.left[i, None]
        within_y, within_x = _reflected(y, self.height), _reflected(x, self.width)
        rows = (i[:, None, None] * self.height + within_y[:, :, None]) * self.width + within_x[:, None, :]
        if shifts is not None and not shifts.reflected:
            outside = (within_y != y)[:, :, None] | (within_x != x)[:, None, :]
            rows = torch.where(outside, len(self.rows) - 2, rows)
        if shifts is not None and shifts.erased is not None:
            top, left, bottom, right = shifts.erased[i, :, None].unbind(1)
            erased_y = (self.y >= (top * self.height).round()) & (self.y < (bottom * self.height).round())
            erased_x = (self.x >= (left * self.width).round()) & (self.x < (right * self.width).round())
            rows = torch.where(erased_y[:, :, None] & erased_x[:, None, :], len(self.rows) - 1, rows)
        pixels = self.rows.index_select(0, rows.flatten()).view(len(i), self.height, self.width, self.channels)
        return pixels.permute(0, 3, 1, 2), self.labels[i]


def _reflected(index: Tensor, size: int) -> Tensor:
    """Return indices from -size + 1 to 2 * size - 2 as reflected by the first and the last pixel, which are not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()
