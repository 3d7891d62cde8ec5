"""torch_memory.py: what forwards change in place is read, folded or not, as they read it."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from folding import EXACT, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.replace import replace_conv

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Three convolutions and a batch norm, and a forward that changes values in place."""

    def __init__(self, forward: Forward, act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, size, padding=size // 2) for size in (3, 1, 1))
        self.bn, self.body, self.act = nn.BatchNorm2d(3), forward, act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Positional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, True)


class Hidden(nn.Module):
    """Cannot be traced, and changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() if x.sum() != 0 else x


def sums(net: Any, x: Tensor) -> Tensor:
    shortcut = x = x * 1
    x += net.a(x)
    return x + shortcut


def stem(net: Any, x: Tensor) -> Tensor:
    x = net.c(x).relu().mul_(0.5)
    return torch.cat([net.a(x) + net.b(x), x.relu()], 1)


def part(net: Any, x: Tensor) -> Tensor:
    y = x.relu()
    first, _ = torch.split(y, [1, 2], 1)
    z = net.a(y)
    first.mul_(2)
    return z + net.b(y)  # type: ignore[no-any-return]


def shared(net: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = net.b(x)
    net.act(x)
    return net.act(y + net.a(x))  # type: ignore[no-any-return]


def returned(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.relu()
    return net.a(y.mul_(2)), y


def twice(net: Any, x: Tensor) -> Tensor:
    y = x.relu()
    return net.a(y.mul_(2).add_(1)) + y  # type: ignore[no-any-return]


def given_from_outside(net: Any, x: Tensor) -> Tensor:
    x *= 2
    return net.b(x)  # type: ignore[no-any-return]


def data(net: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = net.a(y)
    y.data.relu_()
    return z + net.b(y)  # type: ignore[no-any-return]


def number(net: Any, x: Tensor) -> Tensor:
    rows = size = x.shape[2]
    size += 2
    return F.interpolate(net.a(x) + net.b(x), (rows, size))


FORWARDS = [sums, stem, part, returned, twice, given_from_outside, data, number]


@pytest.mark.parametrize(
    "net",
    [*map(Net, FORWARDS), *(Net(shared, act) for act in (nn.ReLU(inplace=True), Positional(), Hidden()))],
    ids=[f.__name__ for f in FORWARDS] + ["shared", "shared positional", "shared hidden"],
)
def test_changes_in_place(net: nn.Module) -> None:
    assert_same(net)


class Masked(nn.Conv2d):
    """PixelCNN's: the optimiser moves what the mask takes out, until the next forward takes it out again."""

    mask: Tensor

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        self.register_buffer("mask", (torch.arange(3) < 2).to(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Clamped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.clone()
        w.clamp_(0)
        return F.conv2d(x, w, self.bias, padding=1)


class ClampedForGood(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(0)
        return F.conv2d(x, self.weight, self.bias, padding=1)


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        b = self.bias * 2
        b += 1
        return F.conv2d(x, self.weight, b, padding=1)


@pytest.mark.parametrize("make", [Masked, Clamped, ClampedForGood, Shifted])
def test_weights_that_a_forward_changes_in_place_are_not_folded(make: type[nn.Conv2d]) -> None:
    model = nn.Sequential(make(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model[1].running_mean.normal_()  # type: ignore[union-attr, operator]
        folded = reparameterize(copy.deepcopy(model))
        assert torch.allclose(folded(x), model(x), rtol=1e-12)
    assert set(folded.fold_report.left) == {"1"}


class AdaptedNorm(nn.BatchNorm2d):
    """At the statistics of the batch at hand."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)), self.weight, self.bias, False, 0.0, self.eps)


class ConditionalNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, x.mean((0, 2, 3)), self.bias, True)


@pytest.mark.parametrize("make", [AdaptedNorm, ConditionalNorm])
@torch.no_grad()
def test_a_batch_norm_by_computed_numbers_is_left(make: type[nn.BatchNorm2d]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make(4)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = reparameterize(model)
    assert torch.equal(folded(x), model(x))
    replace_conv(model)


OPERATIONS = [
    lambda net, a, b: net.a(a),
    lambda net, a, b: net.b(a),
    lambda net, a, b: net.bn(a),
    lambda net, a, b: net.act(a),
    lambda net, a, b: a.relu(),
    lambda net, a, b: a * -1.5,
    lambda net, a, b: a + b,
    lambda net, a, b: operator.iadd(a, b),
    lambda net, a, b: a.mul_(-0.7),
    lambda net, a, b: torch.cat([a[:, 1:3], b[:, :1]], 1),
    lambda net, a, b: torch.cat([F.relu(part, inplace=True) for part in torch.split(a, [1, 2], 1)], 1),
]
STEP = st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(1, 3), st.integers(1, 8))


@settings(max_examples=40)
@given(st.lists(STEP, min_size=3, max_size=9), st.integers(1, 9))
def test_random_programs(steps: list[tuple[int, int, int]], also: int) -> None:
    """Each step reads an older value or two; the last and one more are returned."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        known = [x]
        for operation, a, b in steps:
            known.append(OPERATIONS[operation](net, known[-min(a, len(known))], known[-min(b, len(known))]))
        return known[-1], known[-min(also, len(known))]

    assert_same(randomize(Net(run), SMALL))


@torch.no_grad()
def assert_same(net: nn.Module) -> None:
    """A folded network gives what it gave, and leaves its input as it did."""
    net = net.double().eval()
    mine, theirs = (torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for _ in range(2))
    wanted, got = net(mine), reparameterize(net)(theirs)
    pairs = [(theirs, mine), *(zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)])]
    assert all((g - w).abs().max() <= EXACT * (1 + w.abs().max()) for g, w in pairs)  # it may all be zero


class Bayesian(nn.Conv2d):
    """Draws its weights anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + 0.1 * torch.randn_like(self.weight), self.bias, padding=1)


@torch.no_grad()
def test_weights_that_are_drawn_anew_are_not_folded() -> None:
    model = nn.Sequential(Bayesian(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    folded, x = reparameterize(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert set(folded.fold_report.left) == {"1"}
    assert not torch.equal(folded(x), folded(x))
