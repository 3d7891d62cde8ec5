"""train/augment.py: what reaches the network in training, seen from outside."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from repvgg.models.manifest import Preprocessing
from repvgg.train.augment import RATIOS, shift_of, side_of, train_transform
from repvgg.train.recipes import RECIPES, Recipe

RGB = Preprocessing((3, 48, 40), 48)
GREY = Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("preprocessing", [RGB, GREY])
def test_every_recipe_takes_images_of_any_size(name: str, preprocessing: Preprocessing) -> None:
    transform = train_transform(RECIPES[name], preprocessing)
    channels = preprocessing.input_size[0]
    for height, width in ((8, 8), (100, 37), (16, 16), (1, 2000)):
        for _ in range(8):
            out = transform(torch.randint(0, 256, (channels, height, width), dtype=torch.uint8))
            assert out.shape == preprocessing.input_size
            assert out.dtype == torch.uint8


def spots(recipe: Recipe, draws: int) -> list[tuple[int, int]]:
    """Where a single white pixel at (5, 8) of a 16x16 image comes to lie."""
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[0, 5, 8] = 255
    transform = train_transform(recipe, GREY)
    found: list[tuple[int, int]] = []
    for _ in range(draws):
        where = transform(image)[0].nonzero().tolist()
        assert len(where) == 1
        found.append(tuple(where[0]))
    return found


def test_a_shift_is_at_most_an_eighth_and_never_mirrors() -> None:
    recipe = replace(RECIPES["demo"], crop="shift", flip=False)
    assert set(spots(recipe, 400)) == {(5 + dy, 8 + dx) for dy in range(-2, 3) for dx in range(-2, 3)}


def test_a_longer_shift_brings_in_the_image_reflected() -> None:
    recipe = replace(RECIPES["demo"], shift=0.25, border="reflected", flip=False)
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    padded = v2.functional.pad(image, [4], padding_mode="reflect")
    windows = {(y, x): padded[:, y : y + 16, x : x + 16] for y in range(9) for x in range(9)}
    transform = train_transform(recipe, GREY)
    met = {where for _ in range(400) for out in [transform(image)] for where, one in windows.items() if torch.equal(out, one)}
    assert len(met) > 70


def test_a_shift_is_shorter_than_the_shorter_side() -> None:
    recipe = replace(RECIPES["demo"], shift=0.5, border="reflected")
    flat = Preprocessing((1, 3, 32), 32, mean=(0.5,), std=(0.5,))
    assert shift_of(recipe, flat) == 2
    assert train_transform(recipe, flat)(torch.zeros(1, 3, 32, dtype=torch.uint8)).shape == (1, 3, 32)


def test_half_of_the_images_are_mirrored() -> None:
    plain, mirrored = {8 + dx for dx in range(-2, 3)}, {7 + dx for dx in range(-2, 3)}
    columns = [x for _, x in spots(replace(RECIPES["demo"], flip=True), 400)]
    assert set(columns) == plain | mirrored
    # Of 400 images, those in the column that only mirrored ones reach: half of a fifth.
    assert 15 < columns.count(5) < 70
    assert 15 < columns.count(10) < 70


@pytest.mark.parametrize("setting", [{"auto_augment": True}, {"rand_augment": 9}, {"erasing": 0.99}], ids=str)
def test_what_is_asked_for_changes_pixels(setting: dict[str, Any]) -> None:
    still = replace(RECIPES["demo"], crop="shift", shift=0.0, flip=False)
    image = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8)
    assert torch.equal(train_transform(still, GREY)(image), image)
    transform = train_transform(replace(still, **setting), GREY)
    assert any(not torch.equal(transform(image), image) for _ in range(20))


def ramp(height: int, width: int) -> Tensor:
    """Rows of the same grey level: the row of a pixel can be read off."""
    return torch.linspace(0, 255, height).round().to(torch.uint8).view(1, height, 1).expand(1, height, width).contiguous()


def test_a_random_resized_crop_takes_from_8_to_100_percent() -> None:
    transform = train_transform(Recipe(flip=False), GREY)
    spans = sorted(int(out.max()) - int(out.min()) for out in (transform(ramp(256, 256)) for _ in range(200)))
    assert spans[0] < 120  # a small part
    assert spans[-1] > 220  # nearly all


def test_the_smallest_crop_of_an_image_that_is_large_enough_has_the_inputs_pixels() -> None:
    side = side_of(RECIPES["light"], Preprocessing())
    crop = v2.RandomResizedCrop((224, 224), (RECIPES["light"].crop_area,) * 2, RATIOS)
    drawn = [crop.make_params([torch.empty(3, side, side)]) for _ in range(300)]
    assert min(min(d["height"], d["width"]) for d in drawn) >= 223  # sides are rounded
    assert side_of(RECIPES["demo"], GREY) == 0
