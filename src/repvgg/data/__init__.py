"""Sources of images. One string names one:

digits                 1,797 scans of handwritten digits, embedded (see digits.py)
FOLDER                 <class>/*, of which some are held out; or train/<class>/*, val/<class>/*
TABLE.csv              columns path and label, and split (train, val, test) where the images are divided already
cifar10[:ROOT]         from the hub, or a local copy: parquet shards, or torchvision's cifar-10-batches-py
hf:NAME_OR_PATH        a Hugging Face data set: its hub name, or a local folder of parquet
hf-stream:NAME_OR_PATH the same, read from front to back without a copy on the disk
wds:FOLDER             WebDataset shards, train-*.tar and val-*.tar; or wds:TRAIN;VAL, paths or URLs with {000..146} in them
camvid:ROOT            photos and masks: train/*, trainannot/*, the same for val and test (see masks.py)
cityscapes:ROOT        photos and masks: leftImg8bit/, gtFine/ (see masks.py)

source = open_source("digits")
image, label = source.train[0]             # uint8 [C, H, W], int; or a mask, uint8 [H, W]
"""

import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from repvgg.models.manifest import Preprocessing

VALIDATION = ("val", "valid", "validation")  # what a validation split is called


class DataError(ValueError):
    """A data set that cannot be used; the message names the place and the remedy."""


Whole = tuple[Tensor, Sequence[int]]  # the images of a split, uint8 [N, C, H, W], and their labels


class Images(Protocol):
    """A sequence of (uint8 image [C, H, W], label), or with a mask (torchvision's `Mask`, uint8 [H, W]) for a label. Its keys are
    indices; those of a stream are the examples that it reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Source:
    """Two splits, the names of the classes, how images are prepared for a model, and the recipe that suits them.

    masks: a class for each pixel instead of each image. test: images that have no part in training, where the data has them.
    splitting: the share that was held out for validation and the seed of that draw, where the data had no splits of its own; rows:
    the path, class and split of every image then.
    """

    name: str
    train: Images
    val: Images
    classes: list[str]
    preprocessing: Preprocessing
    recipe: str = "light"
    masks: bool = False
    test: Images | None = None
    splitting: tuple[float, int] | None = None
    rows: Callable[[], list[tuple[str, str, str]]] | None = None

    def limited(self, count: int | None, seed: int = 0) -> "Source":
        """Return the source with at most `count` images of each split, drawn with the seed."""
        if count is None:
            return self
        if count < 1:
            raise DataError(f"--limit {count}: at least one image is needed")
        train, val = (drawn(images, count, seed) for images in (self.train, self.val))
        return replace(self, train=train, val=val, test=self.test and drawn(self.test, count, seed))

    def split(self, name: str) -> Images:
        """Return "train", "val", "test", or "all" of them together. Raises `DataError` for one that is not there."""
        if name == "all":
            if hasattr(self.train, "shuffled"):
                raise DataError(f"{self.name}: is read from front to back: name one of its splits")
            return ConcatDataset([part for part in (self.train, self.val, self.test) if part is not None])  # type: ignore[misc]
        images: Images | None = {"train": self.train, "val": self.val, "test": self.test}.get(name)
        if images is None:
            raise DataError(f"{self.name}: has no split called {name}")
        return images


def drawn(images: Images, count: int, seed: int) -> Images:
    """`count` images drawn with the seed without replacement, in their order, all if there are no more; what is read from front to
    back knows how itself."""
    limited = getattr(images, "limited", None)
    if limited:
        some: Images = limited(count, seed)
        return some
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, sorted(order[:count].tolist()))


class Subset:
    """Some of the images, by their numbers."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[self.indices[index]]

    def whole(self, indices: Sequence[int] | None = None) -> Whole | None:
        """Return all of them, or some, if the images can."""
        whole = getattr(self.images, "whole", None)
        some = self.indices if indices is None else [self.indices[i] for i in indices]
        return whole(some) if whole else None


class Decoded:
    """Images that are decoded already: one uint8 tensor [N, C, H, W]."""

    def __init__(self, pixels: Tensor, labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], self.labels[index]

    def whole(self, indices: Sequence[int] | None = None) -> Whole:
        """Return all of them, or some."""
        if indices is None:
            return self.pixels, self.labels
        return self.pixels[list(indices)], [self.labels[i] for i in indices]


class InMemory:
    """Images of one shape, each decoded when first asked for and then kept, in memory that worker processes share."""

    def __init__(self, decode: Callable[[int], Tensor], labels: Sequence[int], shape: tuple[int, ...]) -> None:
        self.decode, self.labels = decode, labels
        self.pixels = _shared(len(labels), *shape)
        self.known = _shared(len(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self.known[index]:
            image = self.decode(index)
            if image.shape != self.pixels.shape[1:]:
                return image, self.labels[index]
            self.pixels[index] = image
            self.known[index] = 1
        return self.pixels[index], self.labels[index]

    def whole(self, indices: Sequence[int] | None = None) -> Whole | None:
        """Return all of them, or some; None if one is of another shape. Raises `ImageError` where one cannot be read."""
        some = range(len(self)) if indices is None else indices
        with ThreadPoolExecutor() as threads:
            shapes = set(threads.map(lambda i: self[i][0].shape, some))
        if len(shapes) > 1:
            return None
        return self.pixels[list(some)], [self.labels[i] for i in some]


def _shared(*shape: int) -> Tensor:
    """Return uint8 zeros in anonymous memory: /dev/shm, where PyTorch's own shared tensors live, holds but 64 MB in a container."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


def is_files(spec: str) -> bool:
    """Tell whether a folder or a table is meant, and not what a word names: a run folder called digits holds no images."""
    path = Path(spec)
    named = spec in ("digits", "cifar10") and (path / "settings.json").exists()
    return bool(spec) and (path.is_dir() or spec.lower().endswith(".csv")) and not named


def open_source(spec: str, val: float | None = None, seed: int = 0) -> Source:
    """Open the source that a string names.

    val: the share of the images that is held out for validation where the data has no splits of its own, by default a fifth; seed:
    of that draw. Raises `DataError` if it is not there or cannot be trained on, and for `val` where it has splits.
    """
    if is_files(spec):
        from repvgg.data.folder import open_files

        return open_files(Path(spec), val, seed)
    if val is not None:
        raise DataError(f"--val: {spec} has a validation split of its own")
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        from repvgg.data.digits import open_digits

        return open_digits()
    if kind == "cifar10":
        from repvgg.data.cifar10 import open_cifar10

        return open_cifar10(rest)
    if kind == "hf" and rest:
        from repvgg.data.hf import open_hf

        return open_hf(rest)
    if kind == "hf-stream" and rest:
        from repvgg.data.stream import open_stream

        return open_stream(rest)
    if kind == "wds" and rest:
        from repvgg.data.stream import open_wds

        return open_wds(rest)
    if kind in ("camvid", "cityscapes") and rest:
        from repvgg.data.masks import open_camvid, open_cityscapes

        return (open_camvid if kind == "camvid" else open_cityscapes)(Path(rest))
    known = (
        "digits, a folder of class folders, a table (.csv), cifar10[:ROOT], hf:NAME, hf-stream:NAME, wds:SHARDS, camvid:ROOT or "
        "cityscapes:ROOT"
    )
    raise DataError(f"no data {spec!r}: {known}")
