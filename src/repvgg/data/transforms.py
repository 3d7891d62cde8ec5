"""Transforms: torchvision v2 on uint8 images, one by one; normalisation on whole batches, where it is cheap."""

import atexit
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from repvgg.data import DataError, Images
from repvgg.data.images import LONGEST, ImageError, enough
from repvgg.data.workers import leave_signals_to_the_main_process
from repvgg.disk import plain_file, read_text
from repvgg.models.manifest import Preprocessing

MAX_WORKERS = 256


class Plan(Protocol):
    """The batches of a stream, as `repvgg.data.stream.Plan` has them."""

    @property
    def lanes(self) -> Sequence[Any]: ...

    def size(self, batch: int) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def batches(self) -> int: ...

    def examples(self, lane: int) -> Iterator[Any]: ...


def eval_transform(preprocessing: Preprocessing) -> nn.Module:
    """Return a transform from uint8 [C, H, W] of any size to uint8 of the input size."""
    transform: nn.Module = v2.Compose([fit(preprocessing), v2.CenterCrop(preprocessing.input_size[1:])])
    return transform


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Turn uint8 [N, C, H, W] into float32 of mean 0 and deviation 1 on the training set."""
    mean, std = ([255 * x for x in values] for values in (preprocessing.mean, preprocessing.std))
    normalised: Tensor = v2.functional.normalize(images.float(), mean, std)
    return normalised


def fit(preprocessing: Preprocessing) -> nn.Module:
    """Return a transform that resizes the short side."""
    mode = InterpolationMode(preprocessing.interpolation)
    resize: nn.Module = v2.Resize(preprocessing.resize, interpolation=mode, antialias=True)
    return v2.Compose([Trim(), resize])  # type: ignore[no-any-return]


class Trim(nn.Module):
    """Cut the ends off an image that is more than `LONGEST` times as long as wide."""

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        longest = LONGEST * min(height, width)
        if max(height, width) <= longest:
            return image
        trimmed: Tensor = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
        return trimmed


class Transformed:
    """Images through a transform, masks with their photos. Its randomness is a function of seed, epoch and index alone, whatever
    process runs it."""

    def __init__(self, images: Images, transform: nn.Module, seed: int = 0, bad: "BadImages | None" = None, side: int = 0) -> None:
        """Take images and a transform.

        bad: what to do about an image that cannot be read; without it `ImageError` is raised. side: as many pixels are enough (see
        `repvgg.data.images.enough`).
        """
        self.images, self.transform, self.seed, self.bad, self.side = images, transform, seed, bad, side
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by worker processes that live on
        self.spent = torch.zeros(MAX_WORKERS, 2, dtype=torch.float64).share_memory_()  # by worker: seconds, images
        self.reader = 0  # the number of a process that reads lanes; each is the only worker of its loader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]:
        started = time.perf_counter()
        with enough(self.side):
            image, label = self.bad.read(self.images, index) if self.bad else self.images[index]
        before = torch.get_rng_state()
        number = index if isinstance(index, int) else index.position
        torch.default_generator.manual_seed(hash((self.seed, int(self.epoch), number)) % 2**63)
        try:
            return (self.transform(image), label) if isinstance(label, int) else self.transform(image, label)
        finally:
            torch.set_rng_state(before)
            worker = torch.utils.data.get_worker_info()
            row = self.spent[(self.reader + worker.id if worker else 0) % MAX_WORKERS]
            row += torch.tensor([time.perf_counter() - started, 1.0])

    @property
    def images_per_second(self) -> float:
        """Images a second that the workers can load, all together, if nothing keeps them waiting; 0 before any was loaded."""
        used = self.spent[self.spent[:, 1] > 0]
        return float((used[:, 1] / used[:, 0]).sum())


class BadImages:
    """Images that cannot be read are listed in a file, and in training the next one takes their place (in a stream, which has no
    next one yet, a black image); in evaluation they do not count: their label is -1."""

    def __init__(self, listing: Path, replace: bool) -> None:
        self.listing, self.replace = listing, replace

    def read(self, images: Images, index: Any) -> tuple[Tensor, Any]:
        indexed = isinstance(index, int)
        for other in range(len(images) if self.replace and indexed else 1):
            try:
                return images[(index + other) % len(images) if indexed else index]
            except ImageError as error:
                descriptor = plain_file(self.listing, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                with os.fdopen(descriptor, "a") as file:  # one short write: lines of several processes do not mix
                    file.write(f"{error}\n")
        if self.replace and indexed:
            raise ImageError("none of the images can be read")
        return torch.zeros(3, 8, 8, dtype=torch.uint8), index.label if self.replace else -1

    def listed(self) -> list[str]:
        """Return what is listed, each line once."""
        return sorted(set(read_text(self.listing).splitlines())) if self.listing.exists() else []


def load(
    images: Transformed, batch_size: int | Sequence[int], workers: int = 0, order: Iterable[Any] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images [N, C, H, W] and labels [N], in `order`; several sizes take turns.

    Raises `ImageError` for an image that cannot be read.
    """
    sizes = [batch_size] if isinstance(batch_size, int) else batch_size
    loader: Any = torch.utils.data.DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=list(in_batches(range(len(images)) if order is None else order, sizes)),
        num_workers=workers,
        collate_fn=collated,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_main_process if workers else None,
    )
    return closing(loader)


def collated(pairs: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """Return images [C, H, W] as a batch [N, C, H, W] in channels-last, as each lies in memory already; labels as PyTorch does."""
    images, labels = torch.utils.data.default_collate([(image.permute(1, 2, 0), label) for image, label in pairs])
    return images.permute(0, 3, 1, 2), labels


def in_batches(order: Iterable[Any], sizes: Sequence[int]) -> Iterator[list[Any]]:
    """Yield what is in `order` in batches whose sizes take turns; the last one may be smaller."""
    left = iter(order)
    for size in cycle(sizes):
        batch = list(islice(left, size))
        if not batch:
            return
        yield batch


def load_lanes(images: Transformed, plan: Plan, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images [N, C, H, W] and labels [N] of a stream, read, decoded and transformed in the worker processes.

    Raises as `load` does, and `DataError` for a shard that cannot be read.
    """
    return closing(_in_turn(images, plan, min(workers, len(plan.lanes))))


def _in_turn(images: Transformed, plan: Plan, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of all lanes in turn; each worker has lanes of its own, and so a loader."""
    if not workers:
        yield from Lanes(images, plan, 0, 1)
        return
    loaders = [
        iter(
            torch.utils.data.DataLoader(
                Lanes(images, plan, worker, workers),
                batch_size=None,
                num_workers=1,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=leave_signals_to_the_main_process,
            )
        )
        for worker in range(workers)
    ]
    for batch in range(plan.first, plan.batches):
        yield next(loaders[batch % len(plan.lanes) % workers])


class Lanes(torch.utils.data.IterableDataset[Any]):
    """The batches of every `workers`-th lane of a plan, from lane `worker` on."""

    def __init__(self, images: Transformed, plan: Plan, worker: int, workers: int) -> None:
        self.images, self.plan, self.worker, self.workers = images, plan, worker, workers

    def __iter__(self) -> Iterator[Any]:
        self.images.reader = self.worker
        open_lanes: dict[int, Iterator[Any]] = {}
        for batch in range(self.plan.first, self.plan.batches):
            lane = batch % len(self.plan.lanes)
            if lane % self.workers == self.worker:
                if lane not in open_lanes:
                    open_lanes[lane] = self.plan.examples(lane)
                examples = islice(open_lanes[lane], self.plan.size(batch))
                yield collated([self.images[example] for example in examples])


def closing(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield what a loader does; half read it ends its workers at the program's end, and their errors are told as in one process."""
    batches = _batches(loader)
    _unfinished.add(batches)
    return batches


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except (ImageError, DataError) as error:  # from a worker its message holds the whole traceback, newlines spelled out
        kind = type(error)
        reason = str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].removesuffix("\\n")
        error.__traceback__ = None  # which holds the loader: as garbage it would wait seconds for each of its workers
        raise kind(reason.rstrip()) from None


_unfinished: Any = weakref.WeakSet()


@atexit.register
def _finish() -> None:
    """Close what is half read, before the interpreter takes workers and names away from it."""
    for batches in list(_unfinished):
        batches.close()
