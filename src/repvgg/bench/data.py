"""Speed of training data, stage by stage, as one process of a training run meets it.

speeds = data_speeds(open_source("cifar10"), get_recipe("cifar"), workers=2)
speeds["decode"]                                     # images a second that one worker could decode if it did nothing else
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch

from repvgg.data import Source
from repvgg.data.images import enough
from repvgg.data.transforms import collated, normalise
from repvgg.measure.timing import synchroniser
from repvgg.train.batches import Feed
from repvgg.train.recipes import Recipe
from repvgg.train.tasks import task_of

T = TypeVar("T")


def data_speeds(source: Source, recipe: Recipe, workers: int = 0, device: str = "cpu", count: int = 512) -> dict[str, float]:
    """Return images a second by stage, over `count` images of the training split.

    Of images that are read one by one: "read" (streams only: elsewhere it is part of decoding), "decode", "augment" and "collate"
    in one process each. Always: "to device", normalisation included, and "batches", what a training run gets from all its workers,
    of whom there are at most half as many as an epoch has batches.
    Raises ValueError for a count below 1 and where the recipe does not suit the data.
    """
    if count < 1:
        raise ValueError(f"--images {count}: at least 1")
    source = task_of(source).prepared(source, recipe)
    feed = Feed(source, recipe, workers=workers, device=device)
    count = max(feed.part, min(count, feed.count) // feed.part * feed.part)
    speeds, synchronise = dict[str, float](), synchroniser(device)

    def timed(stage: str, each: Callable[[Any], T], items: Iterable[Any], images: int) -> list[T]:
        started = time.perf_counter()
        results = [each(item) for item in items]
        synchronise()
        speeds[stage] = images / (time.perf_counter() - started)
        return results

    if feed.resident is None:
        shuffled, transform = getattr(source.train, "shuffled", None), feed.images.transform
        if shuffled:
            lane = shuffled(0, 0, [count], 1).examples(0)
            keys: Any = timed("read", lambda example: example, islice(lane, count), count)
        else:
            keys = torch.randperm(feed.count, generator=torch.Generator().manual_seed(0))[:count].tolist()
        with enough(feed.images.side):
            decoded = timed("decode", source.train.__getitem__, keys, len(keys))
        augmented = timed(
            "augment", lambda pair: transform(*pair) if source.masks else (transform(pair[0]), pair[1]), decoded, len(keys)
        )
        timed("collate", collated, [augmented[i : i + feed.part] for i in range(0, len(augmented), feed.part)], len(keys))
    batches, wanted = _under_way(feed, count)
    loaded = timed("batches", lambda batch: batch[0], islice(batches, wanted), wanted * feed.part)
    timed("to device", lambda x: normalise(x.to(device), source.preprocessing), loaded, sum(map(len, loaded)))
    return speeds


def _under_way(feed: Feed, count: int) -> tuple[Iterator[Any], int]:
    """Return batches whose workers have started, and how many of them are to be timed: about `count` images, as many of each.

    Workers begin together, so that where the first batch is there all their first ones are, and would seem to take no time.
    """
    most = feed.steps * feed.accumulate
    feed.workers = min(feed.workers, most // 2)
    each = max(1, feed.workers)
    skipped = min(each, most - 1)
    batches = feed.epoch(0)
    for _ in range(skipped):
        next(batches)
    left = most - skipped
    return batches, max(each, min(count // feed.part, left) // each * each)
