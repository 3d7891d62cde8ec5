"""algebra.py against direct float64 computation of its pieces, over random geometry."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from repvgg.fold.algebra import (
    LinearMap,
    PaddingMode,
    Pair,
    ReparamError,
    add,
    batch_norm,
    compose,
    identity,
    regroup,
    scale,
    widen,
)

MODES: tuple[PaddingMode, ...] = ("zeros", "reflect", "replicate", "circular")
BOUND = 1e-12  # 4500 units in the last place: more than any sum here has terms, so it holds in whatever order they are added


def direct(m: LinearMap, x: Tensor) -> Tensor:
    """What a map means, computed by hand: pad first, then convolve without padding."""
    (rows, columns), mode = m.padding, {"zeros": "constant"}.get(m.padding_mode, m.padding_mode)
    if rows or columns:
        x = F.pad(x, (columns, columns, rows, rows), mode=mode)
    return F.conv2d(x, m.kernel, m.bias, m.stride, 0, m.dilation, m.groups)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == torch.float64
    assert float((got - wanted).abs().max()) <= BOUND * float(wanted.abs().max())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(
    out: int,
    into: int,
    kernel_size: Pair = (1, 1),
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    mode: PaddingMode = "zeros",
    bias: bool = True,
) -> LinearMap:
    kernel = noise(out, into // groups, *kernel_size)
    return LinearMap(kernel, noise(out) if bias else torch.zeros(out).double(), stride, padding, dilation, groups, mode)


def pairs(low: int, high: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@dataclass(frozen=True)
class Geometry:
    """Of a convolution that one may draw at random, and an image that is large enough for it."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    mode: PaddingMode
    size: Pair


@st.composite
def geometries(draw: st.DrawFn, kernels: st.SearchStrategy[Pair] | None = None) -> Geometry:
    kernel_size = draw(pairs(1, 7) if kernels is None else kernels)
    dilation, padding = draw(pairs(1, 3)), draw(pairs(0, 4))
    extra = draw(pairs(0, 4))
    size = tuple(d * (k - 1) + 1 + p + e for k, d, p, e in zip(kernel_size, dilation, padding, extra, strict=True))
    return Geometry(kernel_size, draw(pairs(1, 3)), padding, dilation, draw(st.sampled_from(MODES)), (size[0], size[1]))


def of(g: Geometry, out: int, into: int, groups: int = 1, bias: bool = True) -> LinearMap:
    return make(out, into, g.kernel_size, g.stride, g.padding, g.dilation, groups, g.mode, bias)


GROUPS = st.sampled_from([1, 2, 3, 6])
SIDE = st.integers(1, 2)


# ------------------------------------------------------------------------------------------------------------ what a map is


@given(geometries(), GROUPS)
def test_a_map_is_the_convolution_of_its_parts(g: Geometry, groups: int) -> None:
    m = of(g, 2 * groups, 3 * groups, groups)
    x = noise(2, 3 * groups, *g.size)
    assert_same(m(x), direct(m, x))
    assert (m.out_channels, m.in_channels, m.kernel_size) == (2 * groups, 3 * groups, g.kernel_size)


def test_identity_and_scale() -> None:
    x = noise(2, 5, 3, 4)
    assert torch.equal(identity(5)(x), x)
    weight, bias = noise(5), noise(5)
    assert_same(scale(weight, bias)(x), x * weight.view(5, 1, 1) + bias.view(5, 1, 1))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_batch_norm_is_equation_2(affine: bool, dtype: torch.dtype) -> None:
    mean, var = noise(4).to(dtype), (noise(4).abs() + 0.1).to(dtype)
    weight, bias = (noise(4).to(dtype), noise(4).to(dtype)) if affine else (None, None)
    x = noise(2, 4, 3, 3)
    wanted = (x - mean.double().view(4, 1, 1)) / torch.sqrt(var.double() + 1e-3).view(4, 1, 1)
    if weight is not None and bias is not None:
        wanted = wanted * weight.double().view(4, 1, 1) + bias.double().view(4, 1, 1)
    assert_same(batch_norm(mean, var, 1e-3, weight, bias)(x), wanted)


# ----------------------------------------------------------------------------------------------------------------- the rules


@given(geometries(), st.sampled_from([(1, 1), (1, 6), (2, 2), (2, 6), (3, 3), (6, 2), (6, 6)]), pairs(1, 2))
def test_compose_then_pointwise(g: Geometry, groups: tuple[int, int], stride: Pair) -> None:
    first, second = of(g, 12, 6, groups[0]), make(6, 12, stride=stride, groups=groups[1])
    x = noise(2, 6, *g.size)
    assert_same(direct(compose(first, second), x), direct(second, direct(first, x)))


@given(geometries())
def test_compose_then_batch_norm_keeps_the_groups(g: Geometry) -> None:
    first, norm = of(g, 6, 6, 3), batch_norm(noise(6), noise(6).abs() + 0.1, 1e-5, noise(6), noise(6))
    folded = compose(first, norm)
    x = noise(2, 6, *g.size)
    assert_same(direct(folded, x), direct(norm, direct(first, x)))
    assert (folded.groups, folded.kernel_size) == (3, g.kernel_size)


@given(geometries(), st.sampled_from([(1, 1), (1, 6), (2, 2), (2, 6), (6, 3)]), st.booleans())
def test_compose_pointwise_then(g: Geometry, groups: tuple[int, int], second_pads: bool) -> None:
    """Where the second pads with zeros, the first must have no bias; where the first pads, the second must not."""
    bias = not second_pads or g.mode != "zeros" or not any(g.padding)
    first = make(12, 6, padding=(0, 0) if second_pads else g.padding, groups=groups[0], mode=g.mode, bias=bias)
    second = make(6, 12, g.kernel_size, g.stride, g.padding if second_pads else (0, 0), g.dilation, groups[1], g.mode)
    assume(not second.pointwise)
    x = noise(2, 6, *g.size)
    assert_same(direct(compose(first, second), x), direct(second, direct(first, x)))


def test_compose_many() -> None:
    maps = make(8, 4, padding=(1, 1)), make(8, 8, (3, 3), (2, 2), groups=2), make(6, 8), scale(noise(6), noise(6))
    x = wanted = noise(2, 4, 7, 7)
    for m in maps:
        wanted = direct(m, wanted)
    assert_same(direct(compose(*maps), x), wanted)


@given(geometries(), pairs(0, 2))
def test_widen(g: Geometry, border: Pair) -> None:
    """The same numbers with a larger kernel, whose new padding its zeros hide."""
    m = of(g, 3, 2)
    target = (g.kernel_size[0] + 2 * border[0], g.kernel_size[1] + 2 * border[1])
    grown = (g.dilation[0] * border[0], g.dilation[1] * border[1])
    wide = widen(m, target, g.dilation)
    x = noise(2, 2, g.size[0] + grown[0], g.size[1] + grown[1])
    assert_same(direct(wide, x), direct(m, x))
    assert wide.kernel_size == target
    assert wide.padding == (g.padding[0] + grown[0], g.padding[1] + grown[1])


@given(geometries(), st.sampled_from([(1, 1), (6, 1), (6, 2), (6, 3), (6, 6), (4, 2)]), SIDE, SIDE)
def test_regroup(g: Geometry, groups: tuple[int, int], out: int, into: int) -> None:
    many, few = groups
    m = of(g, out * many, into * many, many)
    x = noise(2, into * many, *g.size)
    fewer = regroup(m, few)
    assert fewer.groups == few
    assert_same(direct(fewer, x), direct(m, x))


@given(st.data())
def test_add(data: st.DataObject) -> None:
    """Branches of any smaller centred kernel, whose padding is smaller by as much, and of any groups."""
    odd = st.sampled_from([1, 3, 5, 7])
    g = data.draw(geometries(st.tuples(odd, odd)))
    least = [d * (k // 2) for d, k in zip(g.dilation, g.kernel_size, strict=True)]
    padding = max(least[0], g.padding[0]), max(least[1], g.padding[1])
    g = replace(g, padding=padding, size=(g.size[0] + padding[0], g.size[1] + padding[1]))
    maps = [of(g, 6, 6, data.draw(GROUPS))]
    for _ in range(data.draw(st.integers(0, 3))):
        size = (
            data.draw(st.sampled_from(range(1, g.kernel_size[0] + 1, 2))),
            data.draw(st.sampled_from(range(1, g.kernel_size[1] + 1, 2))),
        )
        shrink = [d * (wide - k) // 2 for d, wide, k in zip(g.dilation, g.kernel_size, size, strict=True)]
        padding = g.padding[0] - shrink[0], g.padding[1] - shrink[1]
        maps.append(make(6, 6, size, g.stride, padding, g.dilation, data.draw(GROUPS), g.mode))
    x = noise(2, 6, *g.size)
    total = add(*maps)
    assert_same(direct(total, x), torch.stack([direct(m, x) for m in maps]).sum(0))
    assert (total.kernel_size, total.padding, total.stride) == (g.kernel_size, g.padding, g.stride)


def test_add_of_asymmetric_kernels() -> None:
    """The asymmetric block of ACNet: 3x3 + 1x3 + 3x1."""
    square, row, column = (make(4, 4, (k, j), (1, 1), (k // 2, j // 2)) for k, j in ((3, 3), (1, 3), (3, 1)))
    x = noise(2, 4, 6, 5)
    total = add(row, square, column)
    assert total.kernel_size == (3, 3)
    assert_same(direct(total, x), direct(square, x) + direct(row, x) + direct(column, x))
    cross = add(row, column)
    assert cross.kernel_size == (3, 3)
    assert float(cross.kernel[:, :, ::2, ::2].abs().max()) == 0


def test_a_pointwise_branch_takes_the_dilation_and_padding_mode_of_the_others() -> None:
    dilated, pointwise = make(4, 4, (3, 3), (1, 1), (2, 2), (2, 2), mode="reflect"), make(4, 4)
    total = add(pointwise, dilated, identity(4))
    assert (total.dilation, total.padding_mode) == ((2, 2), "reflect")
    x = noise(2, 4, 8, 8)
    assert_same(direct(total, x), direct(dilated, x) + direct(pointwise, x) + x)


def test_kernels_in_any_memory_format() -> None:
    m = make(8, 8, (3, 3), (1, 1), (1, 1), groups=2)
    last = replace(m, kernel=m.kernel.contiguous(memory_format=torch.channels_last))
    x, pointwise, before = noise(2, 8, 5, 5), make(4, 8), make(8, 8, groups=4, bias=False)
    assert_same(direct(regroup(last, 1), x), direct(m, x))
    assert_same(direct(add(last, identity(8)), x), direct(m, x) + x)
    assert_same(direct(compose(last, pointwise), x), direct(pointwise, direct(m, x)))
    assert_same(direct(compose(before, last), x), direct(m, direct(before, x)))


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fold", "words"),
    [
        (lambda: add(), "no branches"),
        (lambda: add(make(4, 4), make(4, 2)), "disagree in in channels: 2, 4"),
        (lambda: add(make(4, 4), make(2, 4)), "disagree in out channels: 2, 4"),
        (lambda: add(make(4, 4), make(4, 4, stride=(2, 2))), "disagree in stride"),
        (lambda: add(make(4, 4, (3, 3)), make(4, 4)), r"padding .*: \(0, 0\), \(1, 1\)"),
        (lambda: add(make(4, 4, (3, 3), padding=(1, 1)), make(4, 4, padding=(1, 1))), r"padding .*: \(1, 1\), \(2, 2\)"),
        (lambda: add(make(4, 4, (3, 3)), make(4, 4, (3, 3), dilation=(2, 2))), "disagree in dilation: 1, 2"),
        (
            lambda: add(*(make(4, 4, (3, 3), padding=(1, 1), mode=mode) for mode in ("zeros", "reflect"))),  # type: ignore[arg-type]
            "disagree in padding mode: reflect, zeros",
        ),
        (lambda: add(make(4, 4, (2, 2)), make(4, 4, (3, 3))), "kernel of 2 cannot be centred in one of 3"),
        (lambda: widen(make(4, 4, (5, 5)), (3, 3), (1, 1)), "kernel of 5 cannot be centred in one of 3"),
        (lambda: widen(make(4, 4, (3, 3)), (5, 5), (2, 2)), "dilation 1 cannot be written with dilation 2"),
        (lambda: regroup(make(6, 6, groups=3), 2), "3 groups cannot be written with 2"),
        (lambda: compose(make(4, 2), make(2, 6)), "4 channels go into a map of 6"),
        (lambda: compose(make(4, 2, (3, 3)), make(2, 4, (3, 3))), "3x3 and then a 3x3"),
        (lambda: compose(make(4, 2, (1, 3)), make(2, 4, (3, 1))), "1x3 and then a 3x1"),
        (lambda: compose(make(4, 2, stride=(2, 2)), make(2, 4, (3, 3))), "give the stride to the next"),
        (lambda: compose(make(4, 2, (3, 3)), make(2, 4, padding=(1, 1))), "let the first do the padding"),
        (lambda: compose(make(4, 2), make(2, 4, (3, 3), padding=(1, 1))), "pads what the first adds a bias to"),
        (lambda: compose(make(4, 2, padding=(1, 1), bias=False), make(2, 4, (3, 3), padding=(1, 1))), "both convolutions pad"),
    ],
)
def test_what_is_no_single_convolution_is_refused(fold: Callable[[], LinearMap], words: str) -> None:
    with pytest.raises(ReparamError, match=words):
        fold()


def test_errors_are_told_from_outside_in() -> None:
    error = ReparamError("is wrong", "bn.running_var").inside("conv_kxk").inside("").inside("stages.1.0.block")
    assert str(error) == "stages.1.0.block.conv_kxk.bn.running_var: is wrong"
    assert isinstance(error, ValueError)
    assert str(ReparamError("is wrong")) == "is wrong"


# ----------------------------------------------------------------------------------------------------------------- gradients


def test_the_rules_are_differentiable() -> None:
    def fold(k3: Tensor, k1: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(4, dtype=torch.float64)
        norm = batch_norm(mean, var, 1e-3, gain, shift)
        total = add(compose(LinearMap(k3, zero, padding=(1, 1), groups=2), norm), compose(LinearMap(k1, zero), norm), norm)
        return total.kernel, total.bias

    inputs = noise(4, 2, 3, 3), noise(4, 4, 1, 1), noise(4), noise(4), noise(4), noise(4).abs() + 0.5
    assert torch.autograd.gradcheck(fold, [t.requires_grad_() for t in inputs])
