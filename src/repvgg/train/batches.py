"""Training batches: which images a step takes, and which of them are this process's."""

import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from repvgg.data import Source
from repvgg.data.resident import Resident, Shifts
from repvgg.data.transforms import BadImages, Transformed, load, load_lanes
from repvgg.train.augment import only_shifts, shift_of, side_of
from repvgg.train.distributed import ALONE, World
from repvgg.train.recipes import Recipe
from repvgg.train.tasks import task_of


class Feed:
    """Shuffled, augmented batches: a function of seed, epoch and step, whatever number of workers or processes loads them.

    steps: of an epoch; the incomplete last batch is left out. batch_size: images a step, over all processes; where that cannot be
    divided, `sizes` of this process's parts of a step differ by one, and the largest is `part`. Small images are kept
    whole on the device where the recipe shifts and mirrors them and no more; then there are no workers.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        seed: int = 0,
        workers: int = 0,
        world: World = ALONE,
        bad: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """Divide a source among steps. bad: list unreadable images there instead of stopping.

        Raises ValueError for a batch smaller than its parts.
        """
        listing = BadImages(bad, replace=True) if bad else None
        self.count, self.seed, self.workers, self.world = len(source.train), seed, workers, world
        parts = world.size * recipe.accumulate
        self.batch_size = min(recipe.batch_size, self.count)
        if self.batch_size < parts:
            how = f"{world.size} processes" + (f" of {recipe.accumulate} parts" if recipe.accumulate > 1 else "")
            if self.count < parts:
                raise ValueError(f"{source.name}: {self.count} images to train on are fewer than {parts} parts of a step")
            raise ValueError(f"--batch-size {recipe.batch_size} cannot be divided among {how}: {parts} can")
        edges = [self.batch_size * part // parts for part in range(parts + 1)]
        own = edges[world.rank * recipe.accumulate : (world.rank + 1) * recipe.accumulate + 1]
        self.start, self.sizes = own[0], [stop - start for start, stop in pairwise(own)]
        self.part, self.accumulate = max(self.sizes), recipe.accumulate
        self.steps = self.count // self.batch_size
        transform = task_of(source).train_transform(recipe, source.preprocessing)
        self.images = Transformed(source.train, transform, seed, listing, side_of(recipe, source.preprocessing))
        self.resident = Resident.of(source.train, source.preprocessing, device) if only_shifts(recipe) else None
        self.drawn = partial(Shifts, self.count, shift_of(recipe, source.preprocessing), recipe.border == "reflected", recipe.flip)
        self.spent, self.made = 0.0, 0

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images [size, C, H, W] and labels [size] or masks [size, H, W], from the epoch's step `first` on.

        There are `accumulate` of them a step.
        """
        self.images.epoch.fill_(epoch)
        seed, each = self.seed * 100_003 + epoch, sum(self.sizes)
        shuffled = getattr(self.images.images, "shuffled", None)  # of a stream
        if shuffled:
            batches = self.steps * self.accumulate
            plan = shuffled(seed, self.steps * self.start, self.sizes, batches, first * self.accumulate)
            return load_lanes(self.images, plan, self.workers)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))[: self.steps * self.batch_size]
        own = order.view(self.steps, -1)[first:, self.start : self.start + each].flatten()
        if self.resident is not None:
            return self._from_device(self.resident, own, epoch)
        return load(self.images, self.sizes, self.workers, own.tolist())

    def _from_device(self, resident: Resident, order: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        shifts = self.drawn((self.seed, epoch)).to(resident.device)
        for indices in order.split(self.sizes * (len(order) // sum(self.sizes))) if len(order) else ():
            started = time.perf_counter()
            batch = resident.batch(indices, shifts)
            self.spent, self.made = self.spent + time.perf_counter() - started, self.made + len(indices)
            yield batch

    @property
    def images_per_second(self) -> float:
        """Images a second that this process could be given, if nothing else kept it; 0 before any was."""
        return self.made / self.spent if self.made else self.images.images_per_second
