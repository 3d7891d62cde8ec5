"""Muon, against singular values found by LAPACK and a step written out in float64."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import BLOCKS
from repvgg.models import zoo
from repvgg.train.muon import Muon, orthogonal, turned_kernels
from repvgg.train.optimizer import make_optimizer, parameter_groups
from repvgg.train.recipes import Recipe

RECIPE = Recipe(optimizer="muon", lr=0.2, kernel_lr=0.05, nesterov=True)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_singular_values_come_near_one_whatever_the_shape_and_scale(rows: int, columns: int, scale: float, seed: int) -> None:
    matrix = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    after = (u.T @ found @ v.T).diagonal()
    assert torch.dist(u @ after.diag() @ v, found) < 1e-6  # the same directions
    large = before > 0.2 * before.norm()
    assert after[large].min() > 0.5
    assert after.max() < 1.3


def test_a_gradient_of_zero_stays_zero() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def kernel_and_step(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, Muon]:
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=dtype))
    group = {"params": [kernel], "turned": True}
    return kernel, Muon([group], lr=0.05, momentum=0.9, nesterov=True)


def gradient(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like.dtype)


def test_steps_are_those_of_the_definition() -> None:
    kernel, optimizer = kernel_and_step()
    wanted, momentum = kernel.detach().clone(), torch.zeros_like(kernel)
    for number in range(3):
        kernel.grad = gradient(number, kernel)
        optimizer.step()
        momentum = 0.9 * momentum + kernel.grad
        direction = orthogonal((kernel.grad + 0.9 * momentum).reshape(6, 36)).reshape(kernel.shape)
        size = wanted.norm()
        moved = wanted - 0.05 * size * direction / direction.norm()
        wanted = moved * size / moved.norm()
        assert torch.allclose(kernel, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_turns_a_kernel_by_at_most_its_angle_and_keeps_its_size(dtype: torch.dtype) -> None:
    kernel, optimizer = kernel_and_step(dtype)
    size = kernel.norm().item()
    for number in range(50):
        before = kernel.detach().clone()
        kernel.grad = 1e4 * gradient(number, kernel)
        optimizer.step()
        cosine = (before * kernel).sum() / before.norm() / kernel.norm()
        assert 0.02 < torch.acos(cosine.double()).item() < 0.051
    assert kernel.norm().item() == pytest.approx(size, rel=1e-5)


def test_all_else_moves_as_by_sgd() -> None:
    """To the last bit: biases, batch norms and the classifier."""
    model = zoo.create_model("repvgg_micro", num_classes=10)
    models = [model, copy.deepcopy(model)]
    for model, recipe in zip(models, (RECIPE, replace(RECIPE, optimizer="sgd")), strict=True):
        optimizer: Any = make_optimizer(model, recipe)
        for number in range(2):
            for i, parameter in enumerate(model.parameters()):
                parameter.grad = gradient(100 * number + i, parameter)
            optimizer.step()
    turned = set(turned_kernels(models[0]))
    for (name, ours), sgd in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, sgd) == (ours not in turned), name


def test_kernels_that_a_batch_norm_follows_are_turned() -> None:
    """Not depthwise ones, and none whose size matters: of the others, and those that are added to something before the norm."""
    before, depthwise = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False)
    last = nn.Conv2d(8, 4, 1, bias=False)
    model = nn.Sequential(before, nn.BatchNorm2d(8), depthwise, nn.BatchNorm2d(8), last, nn.Flatten(), nn.Linear(4, 2))
    assert list(turned_kernels(model)) == [before.weight]
    added = Branches(a=nn.Conv2d(4, 4, 3, padding=1, bias=False), identity=nn.BatchNorm2d(4))
    assert not list(turned_kernels(nn.Sequential(added, nn.BatchNorm2d(4))))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_of_every_block_learns(block: str) -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10, width=0.25, block=block).train()
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, RECIPE)
    for number in range(2):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(number))
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    for (name, parameter), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert parameter.grad is None or not torch.equal(parameter, other), name


def test_groups_hold_the_angle_and_no_weight_decay() -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10)
    groups = parameter_groups(model, RECIPE)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    (turned,) = [g for g in groups if g["turned"]]
    assert turned["weight_decay"] == 0
    assert turned["lr_scale"] * RECIPE.peak_lr == pytest.approx(0.05)
    assert {p.dim() for p in turned["params"]} == {4}
    (decaying,) = [g for g in groups if g["weight_decay"]]
    assert [p.dim() for p in decaying["params"]] == [2]  # the classifier
