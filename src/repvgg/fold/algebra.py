"""Linear maps on images, and the three rules that fold a RepVGG block: compose, widen, add.

A map is a kernel, a bias and a geometry (stride, padding, dilation, groups, padding mode): what `torch.nn.functional.conv2d`
computes. A batch norm is one too (1x1, depthwise), and so are the identity and an average pool. Everything here is a pure
function of tensors, in float64, and differentiable. (RepVGG, CVPR 2021, section 3.3, equations 1 to 4.)

    >>> block = add(compose(conv3x3, bn3), compose(conv1x1, bn1), bn0)      # one 3x3 convolution with bias
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
MOST_NUMBERS = 1 << 27  # of a kernel that is made here, or of an input to prove a map on: 1 GB


class ReparamError(ValueError):
    """Something cannot be folded exactly; the message names it and the remedy."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason, self.path = reason, path

    def inside(self, parent: str) -> "ReparamError":
        """Return the same error, seen from the module that holds `parent`."""
        return ReparamError(self.reason, ".".join(p for p in (parent, self.path) if p))


@dataclass(frozen=True, eq=False)
class LinearMap:
    """`x [N, in, H, W] -> conv2d(pad(x), kernel, bias)`, in float64.

    kernel: [out, in / groups, kh, kw]; bias: [out]; padding in pixels on each side, filled as `padding_mode` says
    ("zeros", "reflect", "replicate" or "circular", as in `torch.nn.Conv2d`).
    """

    kernel: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    @property
    def out_channels(self) -> int:
        return self.kernel.shape[0]

    @property
    def in_channels(self) -> int:
        return self.kernel.shape[1] * self.groups

    @property
    def kernel_size(self) -> Pair:
        return self.kernel.shape[2], self.kernel.shape[3]

    @property
    def pointwise(self) -> bool:
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    @property
    def scales_channels(self) -> bool:
        """Each output channel is a multiple of the same input channel, as in a batch norm."""
        return self.pointwise and self.groups == self.in_channels == self.out_channels

    def to(self, device: torch.device | str) -> "LinearMap":
        return replace(self, kernel=self.kernel.to(device), bias=self.bias.to(device))

    def noise(self) -> Tensor:
        """Return an input to prove the map on: two images just large enough for every tap, border and a second step."""
        geometry = zip(self.kernel_size, self.dilation, self.stride, self.padding, strict=True)
        size = [d * (k - 1) + 1 + 2 * s + p for k, d, s, p in geometry]
        if 2 * self.in_channels * math.prod(size) > MOST_NUMBERS:
            raise ReparamError("is too large to be proved")
        random = torch.Generator().manual_seed(self.in_channels * 31 + self.kernel_size[0])
        return torch.randn(2, self.in_channels, *size, generator=random, dtype=torch.float64, device="cpu").to(self.kernel.device)

    def __call__(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros" and any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=self.padding_mode)
            padding = (0, 0)
        return F.conv2d(x, self.kernel, self.bias, self.stride, padding, self.dilation, self.groups)


def scale(weight: Tensor, bias: Tensor) -> LinearMap:
    """`x_i -> weight_i x_i + bias_i` per channel; weight, bias: [channels]."""
    return LinearMap(weight.view(-1, 1, 1, 1), bias, groups=weight.numel())


def identity(channels: int) -> LinearMap:
    """`x -> x` on `channels` channels."""
    one = torch.ones(channels, dtype=torch.float64, device="cpu")
    return scale(one, torch.zeros_like(one))


def average(channels: int, size: Pair, stride: Pair, padding: Pair, divisor: int | None = None) -> LinearMap:
    """Return the average over windows whose padding counts; divisor: by what to divide, in place of the window's size."""
    if channels * math.prod(size) > MOST_NUMBERS:
        raise ReparamError("averages over windows too large to be folded")
    kernel = torch.full((channels, 1, *size), 1 / (divisor or math.prod(size)), dtype=torch.float64)
    return LinearMap(kernel, kernel.new_zeros(channels), stride, padding, groups=channels)


def batch_norm(mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> LinearMap:
    """Batch norm at its running statistics: equation 2, with sigma = sqrt(var + eps)."""
    mean, var = mean.double(), var.double()
    gain = torch.rsqrt(var + eps)
    if weight is not None:
        gain = gain * weight.double()
    shift = -mean * gain
    return scale(gain, shift if bias is None else shift + bias.double())


def regroup(m: LinearMap, groups: int) -> LinearMap:
    """Return the same map written with fewer groups: its kernel gains zeros off the diagonal blocks."""
    if groups == m.groups:
        return m
    if m.groups % groups:
        raise ReparamError(f"a map of {m.groups} groups cannot be written with {groups}")
    out, per_group, *size = m.kernel.shape
    blocks = m.groups // groups
    kernel = m.kernel.view(groups, blocks, out // m.groups, 1, per_group, *size)
    diagonal = torch.eye(blocks, dtype=kernel.dtype, device=kernel.device).view(1, blocks, 1, blocks, 1, 1, 1)
    return replace(m, kernel=(kernel * diagonal).reshape(out, blocks * per_group, *size), groups=groups)


def widen(m: LinearMap, kernel_size: Pair, dilation: Pair) -> LinearMap:
    """Return the same map with its kernel zero-padded about its centre to `kernel_size`; the padding grows with it."""
    padding, border = [], []
    for k, target, p, d, wanted in zip(m.kernel_size, kernel_size, m.padding, m.dilation, dilation, strict=True):
        if target < k or (target - k) % 2:
            raise ReparamError(f"a kernel of {k} cannot be centred in one of {target}")
        if k > 1 and d != wanted:
            raise ReparamError(f"a kernel of dilation {d} cannot be written with dilation {wanted}")
        border.append((target - k) // 2)
        padding.append(p + wanted * border[-1])
    kernel = F.pad(m.kernel, (border[1], border[1], border[0], border[0]))
    return replace(m, kernel=kernel, padding=_pair(padding), dilation=dilation)


def add(*maps: LinearMap) -> LinearMap:
    """Return the sum of branches that see the same input (equation 1).

    Raises `ReparamError` where their outputs could not be added, or their paddings disagree once widened.
    """
    if not maps:
        raise ReparamError("there are no branches to add")
    for what in ("in_channels", "out_channels", "stride"):
        _agree(what, {getattr(m, what) for m in maps})
    kernel_size = _pair(max(m.kernel_size[axis] for m in maps) for axis in (0, 1))
    dilation = _pair(_agree("dilation", {m.dilation[axis] for m in maps if m.kernel_size[axis] > 1} or {1}) for axis in (0, 1))
    mode = _agree("padding mode", {m.padding_mode for m in maps if any(m.padding)} or {"zeros"})
    groups = math.gcd(*(m.groups for m in maps))
    wide = [widen(regroup(m, groups), kernel_size, dilation) for m in maps]
    padding = _agree("padding (once widened to one kernel size)", {m.padding for m in wide})
    kernel, bias = reduce(torch.add, [m.kernel for m in wide]), reduce(torch.add, [m.bias for m in wide])
    return LinearMap(kernel, bias, maps[0].stride, padding, dilation, groups, mode)


def concat(*maps: LinearMap) -> LinearMap:
    """Return the outputs of branches that see the same input, one behind the other along the channels.

    Raises `ReparamError` where their strides, or their paddings once widened, disagree.
    """
    total = sum(m.out_channels for m in maps)
    zero = maps[0].kernel.new_zeros
    shifted, start = [], 0
    for m in maps:
        around = start, total - start - m.out_channels
        kernel = regroup(m, 1).kernel
        kernel = torch.cat([zero(around[0], *kernel.shape[1:]), kernel, zero(around[1], *kernel.shape[1:])])
        bias = torch.cat([zero(around[0]), m.bias, zero(around[1])])
        shifted.append(replace(m, kernel=kernel, bias=bias, groups=1))
        start += m.out_channels
    return add(*shifted)


def pick(m: LinearMap, channels: Tensor) -> LinearMap:
    """Return the map whose outputs are these channels of `m`'s, in this order; channels: [n], int64.

    Raises `ReparamError` where `m` has no such channels.
    """
    if int(channels.max()) >= m.out_channels:
        raise ReparamError(f"takes out channel {int(channels.max())} of {m.out_channels}")
    if torch.equal(channels, torch.arange(m.out_channels, device=channels.device)):
        return m
    m = regroup(m, 1)
    return replace(m, kernel=m.kernel[channels], bias=m.bias[channels])


def compose(first: LinearMap, *others: LinearMap) -> LinearMap:
    """`others[-1](... others[0](first(x)))`, where one of each two neighbours is 1x1 (with a batch norm: equations 3 and 4)."""
    for second in others:
        first = _compose(first, second)
    return first


def _compose(first: LinearMap, second: LinearMap) -> LinearMap:
    if first.out_channels != second.in_channels:
        raise ReparamError(f"{first.out_channels} channels go into a map of {second.in_channels}")
    if first.scales_channels and first.stride == (1, 1):
        return _scale_then(first, second)
    if second.pointwise:
        return _then_pointwise(first, second)
    if first.kernel_size == (1, 1) and first.stride == (1, 1):
        return _pointwise_then(first, second)
    if first.kernel_size == (1, 1):
        raise ReparamError("a 1x1 convolution with a stride skips pixels that the next one needs: give the stride to the next")
    if second.kernel_size == (1, 1):
        raise ReparamError("a 1x1 convolution pads what another has computed: let the first do the padding")
    raise ReparamError(
        f"a {_by(first.kernel_size)} and then a {_by(second.kernel_size)} convolution make a larger one: one must be 1x1"
    )


def _then_pointwise(first: LinearMap, second: LinearMap) -> LinearMap:
    if second.scales_channels:  # the common case (batch norm), without building a dense diagonal
        gain = second.kernel.flatten()
        kernel, bias = first.kernel * gain.view(-1, 1, 1, 1), first.bias * gain + second.bias
        groups = first.groups
    else:
        groups = math.gcd(first.groups, second.groups)
        a, b = _by_group(regroup(first, groups)), _by_group(regroup(second, groups))[..., 0, 0]
        kernel = torch.einsum("gom,gmihw->goihw", b, a).flatten(0, 1)
        bias = torch.einsum("gom,gm->go", b, first.bias.view(groups, -1)).flatten() + second.bias
    return replace(first, kernel=kernel, bias=bias, stride=_times(first.stride, second.stride), groups=groups)


def _pointwise_then(first: LinearMap, second: LinearMap) -> LinearMap:
    if any(second.padding):
        # Zeros that enter after `first` differ from zeros that pass through it, unless its bias is zero.
        if second.padding_mode == "zeros" and bool((first.bias != 0).any()):
            raise ReparamError("the second convolution pads what the first adds a bias to: let the 1x1 do the padding")
        if any(first.padding):
            raise ReparamError("both convolutions pad: let the 1x1 do the padding")
    outer = second if any(second.padding) else first
    groups = math.gcd(first.groups, second.groups)
    a, b = _by_group(regroup(first, groups))[..., 0, 0], _by_group(regroup(second, groups))
    kernel = torch.einsum("gomhw,gmi->goihw", b, a).flatten(0, 1)
    bias = torch.einsum("gomhw,gm->go", b, first.bias.view(groups, -1)).flatten() + second.bias
    return replace(second, kernel=kernel, bias=bias, groups=groups, padding=outer.padding, padding_mode=outer.padding_mode)


def _scale_then(first: LinearMap, second: LinearMap) -> LinearMap:
    """A batch norm, and then a convolution: as `_pointwise_then`, without building a dense diagonal."""
    if any(second.padding) and second.padding_mode == "zeros" and bool((first.bias != 0).any()):
        raise ReparamError(f"a shift would cross the border of a padded {_by(second.kernel_size)}")
    by_group = _by_group(second)
    bias = (by_group.sum((-2, -1)) * first.bias.view(second.groups, 1, -1)).sum(-1).flatten() + second.bias
    kernel = (by_group * first.kernel.view(second.groups, 1, -1, 1, 1)).flatten(0, 1)
    return replace(second, kernel=kernel, bias=bias)


def balance(first: LinearMap, second: LinearMap) -> tuple[LinearMap, LinearMap]:
    """Two maps that compute the same one after the other, even with a ReLU between them, and use each channel to the same extent.

    Channel i is divided by s_i > 0 in the first and multiplied by it in the second, which no ReLU notices. With the largest
    weights a_i and b_i that make and use it, s_i = sqrt(a_i / b_i) makes both sqrt(a_i b_i). (Cross-layer equalisation; Nagel
    et al., ICCV 2019.)
    """
    made = first.kernel.abs().amax((1, 2, 3))
    used = _by_group(second).abs().amax((1, 3, 4)).flatten()
    gain = torch.where((made > 0) & (used > 0), (made / used).sqrt(), 1.0)
    zero = torch.zeros_like(gain)
    return compose(first, scale(1 / gain, zero)), compose(scale(gain, zero), second)


def _by_group(m: LinearMap) -> Tensor:
    return m.kernel.view(m.groups, -1, *m.kernel.shape[1:])


def _agree(what: str, values: set[Any]) -> Any:
    if len(values) > 1:
        raise ReparamError(f"the branches disagree in {what.replace('_', ' ')}: {', '.join(map(str, sorted(values)))}")
    return next(iter(values))


def _pair(values: Any) -> Pair:
    first, second = values
    return first, second


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0], a[1] * b[1]


def _by(size: Pair) -> str:
    return f"{size[0]}x{size[1]}"
