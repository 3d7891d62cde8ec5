"""The linear operators of a computation (flow.py): what each makes of linear maps, and how it is run on tensors for the proof."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.fold.algebra import LinearMap, Pair, ReparamError, add, average, compose, concat, identity, pick, scale

Kind = Literal["convolution", "norm", "scale", "other", "same"]


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear operator: the map of its output, given those of its inputs; and how it is run on tensors, for the proof.

    channels: of its output, None for as many as go in; reads: of its input, where it fits one number only.
    multiplications: for each pixel of its output.
    """

    kind: Kind
    apply: Callable[..., LinearMap]
    run: Callable[..., Tensor]
    channels: int | None = None
    reads: int | None = None
    multiplications: int = 0


def mapped(
    kind: Kind,
    own: Callable[[int], LinearMap],
    run: Callable[[Tensor], Tensor],
    channels: int | None = None,
    reads: int | None = None,
    multiplications: int = 0,
) -> Operator:
    """Return an operator of one input that is the map `own(channels that go in)`: a convolution, a batch norm, a pool."""

    def apply(m: LinearMap) -> LinearMap:
        return compose(m, own(m.out_channels).to(m.kernel.device))

    return Operator(kind, apply, run, channels, reads, multiplications)


def convolved(own: Callable[[], LinearMap], run: Callable[[Tensor], Tensor], shape: torch.Size, groups: int) -> Operator:
    """Return a convolution with a kernel of `shape` [out, in / groups, kh, kw]."""
    return mapped("convolution", lambda _: own(), run, shape[0], shape[1] * groups, math.prod(shape))


def normed(own: Callable[[], LinearMap], run: Callable[[Tensor], Tensor], channels: int) -> Operator:
    """Return a batch norm."""
    return mapped("norm", lambda _: own(), run, channels, channels, channels)


def same() -> Operator:
    """Return what changes nothing: an identity, a dropout in eval mode."""
    return Operator("same", lambda m: m, lambda x: x)


def scaled(weight: Tensor, bias: Tensor) -> Operator:
    """`weight x + bias`; both of one number, or one for each channel."""
    weight, bias = weight.double().flatten(), bias.double().flatten()

    def own(channels: int) -> LinearMap:
        if {weight.numel(), bias.numel()} - {1, channels}:
            raise ReparamError("its constant does not have one number for each channel")
        return scale(weight.expand(channels).contiguous(), bias.expand(channels).contiguous())

    return mapped("scale", own, lambda x: x * weight.view(-1, 1, 1).to(x) + bias.view(-1, 1, 1).to(x))


def padded(rows: int, columns: int) -> Operator:
    """Zeros around the image, as many on one side as on the other."""

    def own(channels: int) -> LinearMap:
        return replace(identity(channels), padding=(rows, columns))

    return mapped("other", own, lambda x: F.pad(x, (columns, columns, rows, rows)))


def pooled(size: Pair, stride: Pair, padding: Pair, divisor: int | None = None) -> Operator:
    """Return an average over windows, whose padding counts."""
    own = lambda channels: average(channels, size, stride, padding, divisor)  # noqa: E731
    return mapped("other", own, lambda x: F.avg_pool2d(x, size, stride, padding, divisor_override=divisor))


def strided(rows: int, columns: int) -> Operator:
    """Return every `rows`-th row and `columns`-th column of its input, from the first on."""

    def own(channels: int) -> LinearMap:
        return replace(identity(channels), stride=(rows, columns))

    return mapped("other", own, lambda x: x[..., ::rows, ::columns])


def summed(*signs: int) -> Operator:
    """Return the sum of its inputs, each times its sign."""

    def apply(*maps: LinearMap) -> LinearMap:
        return add(*(replace(m, kernel=m.kernel * s, bias=m.bias * s) for m, s in zip(maps, signs, strict=True)))

    return Operator("other", apply, lambda *xs: sum(x * s for x, s in zip(xs, signs, strict=True)))  # type: ignore[arg-type]


def concatenated() -> Operator:
    """Its inputs one behind the other along the channels."""
    return Operator("other", concat, lambda *xs: torch.cat(xs, dim=1))


def picked(channels: Iterable[int]) -> Operator:
    """Return some channels of its input, in some order."""
    index = torch.tensor(list(channels))
    return Operator("other", lambda m: pick(m, index.to(m.kernel.device)), lambda x: x[:, index.to(x.device)], index.numel())


def part_of_norm(norm: Operator, start: int, count: int, total: int) -> Operator:
    """Return a batch norm of `total` channels on `count` of them, from `start` on."""
    whole = norm.apply(identity(total))

    def run(x: Tensor) -> Tensor:
        return norm.run(F.pad(x, (0, 0, 0, 0, start, total - start - count)))[:, start : start + count]

    gain, shift = (t[start : start + count] for t in (whole.kernel.flatten(), whole.bias))
    return normed(lambda: scale(gain, shift), run, count)
