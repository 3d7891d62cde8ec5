"""The whitening start, against covariances computed patch by patch, and in a run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repvgg import load
from repvgg.data import open_source
from repvgg.models import zoo
from repvgg.train.loop import train
from repvgg.train.recipes import Recipe
from repvgg.train.whiten import IMAGES, whiten


def coloured(count: int, seed: int = 0) -> Tensor:
    """Images whose neighbours and channels go together, as in photos."""
    noise = torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.avg_pool2d(noise, 3, 1)
    return smooth + 0.5 * smooth.mean(1, keepdim=True)


def first(model: Any) -> nn.Conv2d:
    """The 3x3 of a RepVGG's stem."""
    conv: nn.Conv2d = model.stem.block.conv_kxk.conv
    return conv


def patches(images: Tensor) -> Tensor:
    rows = [images[:, :, i : i + 3, j : j + 3].flatten(1) for i in range(images.shape[2] - 2) for j in range(images.shape[3] - 2)]
    return torch.cat(rows).double()


def test_what_the_first_kernels_find_is_uncorrelated_and_of_one_size() -> None:
    images, model = coloured(60), zoo.create_model("repvgg_a0")
    whiten(model, images.split(20))
    kernels = first(model).weight.detach().double().flatten(1)
    found = patches(images) @ kernels[:24].T  # of 48 kernels; the others are their negatives
    assert torch.equal(kernels[24:], -kernels[:24])
    moments = found.T @ found / len(found)
    assert (moments - moments.diag().diag()).abs().max() < 1e-3
    assert moments.diag().max() < 1.001
    assert moments.diag().min() > 0.8  # those that differ least stay somewhat smaller
    assert (kernels[:24].norm(dim=1).diff() > 0).all()  # the directions of most variance first, so with the smallest kernels


def test_a_wide_layer_has_all_directions_and_keeps_its_other_kernels() -> None:
    torch.manual_seed(0)
    point, wide = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 60, 3)
    point_before, before = point.weight.clone(), wide.weight.clone()
    whiten(nn.Sequential(point, wide), [coloured(8)])
    assert torch.equal(point.weight, point_before)
    assert torch.equal(wide.weight[54:], before[54:])
    assert not torch.equal(wide.weight[:54], before[:54])


def test_only_so_many_images_are_looked_at() -> None:
    seen = []

    def batches() -> Iterator[Tensor]:
        for number in range(100):
            seen.append(number)
            yield coloured(500, number)

    whiten(zoo.create_model("repvgg_micro"), batches())
    assert len(seen) == IMAGES // 500


def test_images_without_colour_leave_finite_kernels() -> None:
    model = zoo.create_model("repvgg_micro")
    whiten(model, [coloured(8).mean(1, keepdim=True).expand(-1, 3, -1, -1)])
    assert all(p.isfinite().all() for p in model.parameters())
    whiten(model, [torch.zeros(4, 3, 16, 16)])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_network_without_such_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="--whiten: Linear has no convolution"):
        whiten(nn.Linear(2, 2), [coloured(2)])


def test_a_run_starts_so_where_the_recipe_says_it_and_weights_are_new(tmp_path: Path) -> None:
    source = open_source("digits").limited(64)
    recipe = Recipe(epochs=1, batch_size=64, lr=1e-30, weight_decay=0.0, whiten=True, crop="shift")  # nothing moves

    def kernels(name: str, recipe: Recipe, init: str = "") -> Tensor:
        train("" if init else "repvgg_micro", source, recipe, tmp_path / name, init=init, log=lambda line: None)
        assert json.loads((tmp_path / name / "recipe.json").read_text())["whiten"] == recipe.whiten
        return first(load(tmp_path / name / "last.safetensors")).weight.detach()

    white, plain = kernels("white", recipe), kernels("plain", replace(recipe, whiten=False))
    half = len(white) // 2
    count = min(half, white[0].numel())
    assert torch.equal(white[:count], -white[count : 2 * count])
    assert not torch.equal(plain[:count], -plain[count : 2 * count])
    assert torch.equal(kernels("on", recipe, init=str(tmp_path / "plain" / "last.safetensors")), plain)
