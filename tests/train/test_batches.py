"""train/feed.py: which images a step takes, on any number of processes, in any number of parts, from any step on."""

from itertools import chain

import pytest
import torch

from repvgg.data import Decoded, Source
from repvgg.models.manifest import Preprocessing
from repvgg.train.batches import Feed
from repvgg.train.distributed import World
from repvgg.train.recipes import Recipe

RECIPE = Recipe(batch_size=12, crop="shift", flip=False)


@pytest.fixture(params=["resident", "read"], autouse=True)
def _road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images lie on the device; photos are read one by one."""
    if request.param == "read":
        monkeypatch.setattr("repvgg.train.batches.only_shifts", lambda recipe: False)


def source(n: int = 50) -> Source:
    images = Decoded(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous(), list(range(n)))
    return Source("numbered", images, images, [str(i) for i in range(n)], Preprocessing((1, 4, 4), 4, mean=(0.5,), std=(0.5,)))


def labels(feed: Feed, epoch: int, first: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in feed.epoch(epoch, first)]


def test_each_epoch_has_an_order_of_its_own() -> None:
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            seen = labels(Feed(source(), RECIPE, seed), epoch)
            assert [len(batch) for batch in seen] == [12] * 4  # the incomplete fifth is left out
            orders[seed, epoch] = tuple(chain(*seen))
            assert len(set(orders[seed, epoch])) == 48
    assert len(set(orders.values())) == 4
    assert tuple(chain(*labels(Feed(source(), RECIPE, 1), 1))) == orders[1, 1]


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (3, 1), (1, 4), (2, 3), (6, 2), (5, 1), (3, 3), (1, 5)])
def test_processes_and_parts_divide_the_same_global_batches(size: int, accumulate: int) -> None:
    whole = labels(Feed(source(), RECIPE, 3), 2)
    recipe = Recipe(batch_size=12, crop="shift", flip=False, accumulate=accumulate)
    shares = [labels(Feed(source(), recipe, 3, world=World(rank, size)), 2) for rank in range(size)]
    for step, batch in enumerate(whole):
        parts = [share[step * accumulate + i] for share in shares for i in range(accumulate)]
        assert list(chain(*parts)) == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= (12 % len(parts) > 0)


def test_an_epoch_goes_on_at_any_step() -> None:
    feed = Feed(source(), RECIPE, 3)
    whole = [(x.clone(), y.clone()) for x, y in feed.epoch(1)]
    for first in range(5):
        rest = list(feed.epoch(1, first))
        assert len(rest) == 4 - first
        assert all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(rest, whole[first:], strict=True))


def test_what_is_drawn_for_an_image_is_another_in_each_epoch_and_of_each_seed() -> None:
    recipe = Recipe(batch_size=12, crop="shift", shift=0.5, flip=False)  # two of 4 pixels, and black comes in

    def drawn(seed: int, epoch: int) -> dict[int, torch.Tensor]:
        return {int(y): x for xs, ys in Feed(source(), recipe, seed).epoch(epoch) for x, y in zip(xs, ys, strict=True)}

    first = drawn(3, 0)
    for other in (drawn(3, 1), drawn(4, 0)):
        both = first.keys() & other.keys()
        assert len(both) > 40
        assert any(not torch.equal(first[i], other[i]) for i in both)
    assert all(torch.equal(x, first[i]) for i, x in drawn(3, 0).items())


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 12 cannot be divided among 13 processes: 13 can"):
        Feed(source(), RECIPE, world=World(0, 13))
    with pytest.raises(ValueError, match="--batch-size 12 cannot be divided among 5 processes of 3 parts: 15 can"):
        Feed(source(), Recipe(batch_size=12, accumulate=3), world=World(0, 5))
    with pytest.raises(ValueError, match="numbered: 2 images to train on are fewer than 4 parts of a step"):
        Feed(source(2), RECIPE, world=World(0, 4))


def test_a_small_set_makes_a_smaller_batch() -> None:
    feeds = [Feed(source(7), RECIPE, world=World(rank, 3)) for rank in range(3)]
    assert [(feed.batch_size, feed.part, feed.steps) for feed in feeds] == [(7, 2, 1), (7, 2, 1), (7, 3, 1)]
