"""Small images kept whole on the device, and cropped and mirrored there in batches: no worker is as fast as no worker.

resident = Resident.of(source.train, source.preprocessing, "cuda")       # None for what must be read image by image
images, labels = resident.batch(indices)                                 # uint8 [N, C, H, W], int64 [N]
images, labels = resident.batch(indices, Shifts(len(source.train), 4, False, flip=True, seed=(0, epoch)))
"""

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.data import Images
from repvgg.data.images import ImageError
from repvgg.data.transforms import fit
from repvgg.models.manifest import Preprocessing

AT_ONCE = 4096  # images that are resized together
MOST_BYTES = 1 << 30  # of a split at the input's size, which is copied a few times on the way: CIFAR-10 has 150 MB
_known: Any = weakref.WeakKeyDictionary()  # the one of each split, for as long as that lives


class Shifts:
    """The shift and the mirroring of each image of a split in one epoch: a function of seed, epoch and image alone.

    An image is mirrored in every other epoch, half of them in the first: of two epochs neither shows it twice the same way, as
    chance would (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds").
    """

    def __init__(self, count: int, most: int, reflected: bool, flip: bool, seed: tuple[int, int]) -> None:
        """Draw them.

        most: pixels that a shift is at most, fewer than either side has. reflected: the image comes in from outside, not black.
        seed: of the run, and the number of the epoch.
        """
        self.reflected = reflected
        run, epoch = seed
        random = torch.Generator().manual_seed(hash(seed) % 2**63)
        self.top, self.left = torch.randint(0, 2 * most + 1, (2, count), generator=random) - most
        at_first = torch.rand(count, generator=torch.Generator().manual_seed(run)) < 0.5
        self.mirrored = (at_first ^ bool(epoch % 2)) & flip

    def to(self, device: str) -> "Shifts":
        """Move them to a device."""
        self.top, self.left, self.mirrored = (t.to(device, non_blocking=True) for t in (self.top, self.left, self.mirrored))
        return self


class Resident:
    """All images of a split, of the input's size."""

    def __init__(self, pixels: Tensor, labels: Tensor, device: str) -> None:
        """Take the pixels, uint8 [N, C, H, W], and labels [N] to a device."""
        self.count, self.channels, self.height, self.width = pixels.shape
        # A pixel is a row, with its channels in it, so that a batch is one selection of rows. The last row is black.
        self.rows = F.pad(pixels.permute(0, 2, 3, 1).reshape(-1, self.channels), (0, 0, 0, 1)).to(device)
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
        return cls(pixels, torch.tensor(labels), device)

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
            rows = torch.where(outside, len(self.rows) - 1, rows)
        pixels = self.rows.index_select(0, rows.flatten()).view(len(i), self.height, self.width, self.channels)
        return pixels.permute(0, 3, 1, 2), self.labels[i]


def _reflected(index: Tensor, size: int) -> Tensor:
    """Return indices from -size + 1 to 2 * size - 2 as reflected by the first and the last pixel, which are not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()
