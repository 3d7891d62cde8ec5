"""data/resident.py: what a batch on the device holds, against torchvision's crop and flip, image by image."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from repvgg.data import Decoded, InMemory, Source, drawn, open_source
from repvgg.data.images import ImageError
from repvgg.data.resident import Resident, Shifts
from repvgg.data.transforms import Transformed, eval_transform
from repvgg.models.manifest import Preprocessing
from repvgg.train.batches import Feed
from repvgg.train.distributed import World
from repvgg.train.recipes import get_recipe

RECIPE = replace(get_recipe("cifar"), batch_size=16)


def images(n: int = 40, size: int = 16) -> Decoded:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=random).to(torch.uint8)
    return Decoded(pixels, [i % 4 for i in range(n)])


def source(data: Any) -> Source:
    return Source("small", data, data, list("abcd"), Preprocessing((3, 16, 16), 16))


def feed(seed: int = 3, data: Any = None, **options: Any) -> Feed:
    return Feed(source(data or images()), RECIPE, seed, **options)


@pytest.mark.parametrize("reflected", [False, True])
def test_a_batch_is_what_torchvision_crops_and_flips(reflected: bool) -> None:
    data = images()
    resident = Resident.of(data, Preprocessing((3, 16, 16), 16), "cpu")
    assert resident is not None
    shifts = Shifts(40, 2, reflected, True, (0, 5))
    indices = torch.randperm(40)[:23]
    pixels, labels = resident.batch(indices, shifts)
    assert pixels.dtype == torch.uint8
    assert labels.tolist() == [i % 4 for i in indices.tolist()]
    for got, i in zip(pixels, indices.tolist(), strict=True):
        padded = v2.functional.pad(data.pixels[i], [2], padding_mode="reflect" if reflected else "constant")
        crop = v2.functional.crop(padded, int(shifts.top[i]) + 2, int(shifts.left[i]) + 2, 16, 16)
        assert torch.equal(got, v2.functional.hflip(crop) if shifts.mirrored[i] else crop)
    seen = {(int(t), int(x), bool(m)) for t, x, m in zip(shifts.top, shifts.left, shifts.mirrored, strict=True)}
    assert len(seen) > 20
    assert {t for t, _, _ in seen} == {-2, -1, 0, 1, 2}


def test_what_is_evaluated_is_what_was_before() -> None:
    for data, p in ((images(), Preprocessing((3, 16, 16), 16)), (open_source("digits").val, open_source("digits").preprocessing)):
        resident = Resident.of(data, p, "cpu")
        assert resident is not None
        one_by_one = Transformed(data, eval_transform(p))
        pixels, labels = resident.batch(torch.arange(len(data)))
        assert all(torch.equal(pixels[i], one_by_one[i][0]) and int(labels[i]) == one_by_one[i][1] for i in range(len(data)))


def test_it_is_a_function_of_seed_epoch_and_image() -> None:
    def epoch(seed: int, number: int, **options: Any) -> dict[int, Tensor]:
        numbered = Decoded(images().pixels, list(range(40)))
        made = Feed(replace(source(numbered), classes=[str(i) for i in range(40)]), RECIPE, seed, **options)
        assert made.resident is not None
        return {int(i): x for batch, labels in made.epoch(number) for x, i in zip(batch, labels, strict=True)}

    whole = epoch(3, 1)
    halves = [epoch(3, 1, world=World(rank, 2)) for rank in (0, 1)]
    assert halves[0].keys().isdisjoint(halves[1])
    for i, x in (halves[0] | halves[1]).items():
        assert torch.equal(x, whole[i])
    for other in (epoch(4, 1), epoch(3, 2)):
        assert any(not torch.equal(x, other[i]) for i, x in whole.items() if i in other)
    again = epoch(3, 1, workers=2)
    assert all(torch.equal(x, again[i]) for i, x in whole.items())


def test_only_what_it_can_do_alike() -> None:
    p = Preprocessing((3, 16, 16), 16)
    assert feed().resident is not None
    others: list[dict[str, Any]] = [{"crop": "random_resized"}, {"auto_augment": True}, {"rand_augment": 9}, {"erasing": 0.5}]
    for setting in others:
        assert Feed(source(images()), replace(RECIPE, **setting)).resident is None, setting
    unread = InMemory(lambda i: pytest.fail("decoded, though they are too many"), [0] * 1_500_000, (3, 16, 16))
    assert Resident.of(unread, p, "cpu") is None
    odd = InMemory(lambda i: torch.zeros(3, 16 + i, 16, dtype=torch.uint8), [0, 1], (3, 16, 16))
    assert Resident.of(odd, p, "cpu") is None

    def broken(i: int) -> Tensor:
        raise ImageError("bad")

    assert Resident.of(InMemory(broken, [0, 1], (3, 16, 16)), p, "cpu") is None
    wide = Decoded(torch.zeros(2, 3, 16, 30, dtype=torch.uint8), [0, 1])
    assert Resident.of(wide, p, "cpu") is None
    many = Decoded(torch.zeros(1, 3, 16, 16, dtype=torch.uint8).expand(10000, -1, -1, -1), [0] * 10000)
    assert Resident.of(many, Preprocessing((3, 224, 224), 224), "cpu") is None  # 1.5 GB


def test_a_subset_is_decoded_alone() -> None:
    asked: list[int] = []

    def decode(i: int) -> Tensor:
        asked.append(i)
        return images().pixels[i]

    part: Any = drawn(InMemory(decode, list(range(40)), (3, 16, 16)), 7, seed=0)
    resident = Resident.of(part, Preprocessing((3, 16, 16), 16), "cpu")
    assert resident is not None
    assert sorted(asked) == list(part.indices)
    pixels, labels = resident.batch(torch.arange(7))
    assert labels.tolist() == list(part.indices)
    assert torch.equal(pixels, images().pixels[list(part.indices)])
    assert Resident.of(part, Preprocessing((3, 16, 16), 16), "cpu") is resident
    assert len(asked) == 7


def test_a_subset_of_a_subset() -> None:
    """As `prune --limit` takes it: both drawn, and read as one by one."""
    part: Any = drawn(drawn(images(), 7, seed=0), 3, seed=1)
    whole = part.whole()
    assert whole is not None
    assert torch.equal(whole[0], torch.stack([part[i][0] for i in range(3)]))
    assert list(whole[1]) == [part[i][1] for i in range(3)]


@pytest.mark.parametrize("flip", [True, False])
def test_mirrors_are_half_or_none(flip: bool) -> None:
    assert abs(float(Shifts(4000, 4, False, flip, (0, 0)).mirrored.float().mean()) - (0.5 if flip else 0)) < 0.05


def test_an_image_is_mirrored_in_every_other_epoch() -> None:
    first, second, third = (Shifts(100, 4, False, True, (7, epoch)).mirrored for epoch in range(3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert not torch.equal(first, Shifts(100, 4, False, True, (8, 0)).mirrored)
