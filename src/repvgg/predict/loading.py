"""Images of a data set on their way to a network: read in the main process, decoded in others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import rgb_to_grayscale

from repvgg.data.images import ImageError, decode
from repvgg.data.shards import Item, Shards
from repvgg.data.transforms import closing
from repvgg.data.workers import leave_signals_to_the_main_process


@dataclass(frozen=True)
class Batch:
    """Images of one shard, from its `start`-th on; a shard without images has one batch without images."""

    shard: int
    start: int
    last: bool
    items: list[Item]


@dataclass(frozen=True)
class Loaded:
    """A decoded batch.

    errors: why an image could not be decoded, or None. sizes, pixels: of those that could, uint8 [n, C, H, W].
    """

    batch: Batch
    errors: list[str | None]
    sizes: list[tuple[int, int]]
    pixels: Tensor | None


class Decoder:
    """Decodes batches, as a data set for PyTorch's loader."""

    def __init__(self, prepare: nn.Module, channels: int) -> None:
        self.prepare, self.channels = prepare, channels

    def __getitem__(self, batch: Batch) -> Loaded:
        errors: list[str | None] = []
        sizes, pixels = [], []
        for item in batch.items:
            try:
                image = self._decoded(item)
                pixels.append(self.prepare(image))
                sizes.append((image.shape[1], image.shape[2]))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        without = replace(batch, items=[replace(item, image=b"") for item in batch.items])
        return Loaded(without, errors, sizes, torch.stack(pixels) if pixels else None)

    def _decoded(self, item: Item) -> Tensor:
        if not isinstance(item.image, Tensor):
            return decode(item.image, self.channels, name=item.key)
        if item.image.shape[0] == self.channels:
            return item.image
        return item.image.expand(3, -1, -1) if self.channels == 3 else rgb_to_grayscale(item.image)


def load(shards: Shards, wanted: Sequence[int], decoder: Decoder, batch_size: int, workers: int) -> Iterator[Loaded]:
    """Yield the decoded batches of the wanted shards, in order."""
    loader: Any = DataLoader(
        decoder,  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches(shards, wanted, batch_size),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=leave_signals_to_the_main_process if workers else None,
    )
    return closing(loader)


def batches(shards: Shards, wanted: Iterable[int], size: int) -> Iterator[Batch]:
    """Yield the images of the wanted shards, at most `size` at a time."""
    for shard in wanted:
        items, start = iter(shards.read(shard)), 0
        batch = list(islice(items, size))
        while following := list(islice(items, size)):
            yield Batch(shard, start, False, batch)
            batch, start = following, start + size
        yield Batch(shard, start, True, batch)


def _as_it_is(loaded: Any) -> Any:
    return loaded
