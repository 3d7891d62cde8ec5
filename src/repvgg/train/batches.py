"""Training batches: which images a step takes, and which of them are this process's."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from repvgg.data import Source
from repvgg.data.transforms import BadImages, Transformed, load
from repvgg.train.distributed import ALONE, World
from repvgg.train.recipes import Recipe
from repvgg.train.tasks import task_of


class Feed:
    """Shuffled, augmented batches: a function of seed, epoch and step, whatever number of workers or processes loads them.

    steps: of an epoch; the incomplete last batch is left out. batch_size: images a step, over all processes.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        seed: int = 0,
        workers: int = 0,
        world: World = ALONE,
        bad: Path | None = None,
    ) -> None:
        """bad: list unreadable images there instead of stopping. Raises ValueError for a batch that cannot be divided."""
        listing = BadImages(bad, replace=True) if bad else None
        transform = task_of(source).train_transform(recipe, source.preprocessing)
        self.images = Transformed(source.train, transform, seed, listing)
        self.seed, self.workers, self.world = seed, workers, world
        parts = world.size * recipe.accumulate
        if recipe.batch_size % parts:
            how = f"{world.size} processes" + (f" of {recipe.accumulate} parts" if recipe.accumulate > 1 else "")
            near = max(1, round(recipe.batch_size / parts)) * parts
            raise ValueError(f"--batch-size {recipe.batch_size} cannot be divided among {how}: {near} can")
        self.batch_size = min(recipe.batch_size, len(self.images)) // parts * parts
        if not self.batch_size:
            raise ValueError(f"{source.name}: {len(self.images)} images to train on are fewer than {parts} parts of a step")
        self.part = self.batch_size // parts
        self.steps = len(self.images) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images [part, C, H, W] and labels [part] or masks [part, H, W], from the epoch's step `first` on, `accumulate` of
        them a step."""
        self.images.epoch.fill_(epoch)
        seed, (rank, size) = self.seed * 100_003 + epoch, (self.world.rank, self.world.size)
        if hasattr(self.images.images, "order"):  # a stream
            each = self.batch_size // size
            return load(
                self.images, self.part, self.workers, self.images.images.order(seed, rank, size, first * each, self.steps * each)
            )
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))[: self.steps * self.batch_size]
        own = order.view(self.steps, size, -1)[first:, rank]
        return load(self.images, self.part, self.workers, own.flatten().tolist())
