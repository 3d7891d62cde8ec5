"""Foldable blocks, each declared as a composition of standard modules; the fold follows from the parts (see reparam.py).

A block is linear: a function `(in_channels, out_channels, stride, dilation, groups) -> Branches`. The activation and
squeeze-excite belong to the layer around it: `act(se(block(x)))`.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.algebra import PaddingMode
from repvgg.reparam import Branches, register_convolution


@register_convolution
class Conv1x1(nn.Conv2d):
    """A 1x1 convolution without padding or bias that drops the pixels its stride skips before it multiplies, not after.

    The same numbers as `nn.Conv2d`; but oneDNN's backward of a strided 1x1 corrupts the heap for 3 input channels in
    channels_last (seen with PyTorch 2.13 and 2.15 on x86), which is the stem's 1x1 branch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], self.weight, groups=self.groups)


def with_bn(conv: nn.Conv2d) -> nn.Sequential:
    """`conv`, then batch norm."""
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels)))


def repvgg(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    *,
    with_1x1: bool = True,
    with_identity: bool = True,
) -> Branches:
    """3x3 + 1x1 + identity, each with batch norm; the identity only where input and output have one shape (equation 1).

    `with_1x1` and `with_identity` take a branch away, for the ablation of Table 6.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, False, padding_mode)
    block = Branches(conv_kxk=with_bn(conv))
    if with_1x1:
        block.add_module("conv_1x1", with_bn(Conv1x1(in_channels, out_channels, stride, groups)))
    if with_identity and in_channels == out_channels and stride == 1:
        block.add_module("identity", nn.BatchNorm2d(in_channels))
    return block


def deploy_conv(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> nn.Conv2d:
    """What each block folds into: one 3x3 convolution with bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, True, padding_mode)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "repvgg": repvgg,
    "plain": partial(repvgg, with_1x1=False, with_identity=False),
    "no_identity": partial(repvgg, with_identity=False),
    "no_1x1": partial(repvgg, with_1x1=False),
}


class SqueezeExcite(nn.Module):
    """Channels rescaled by a two-layer network of their means (Hu et al. 2018), as in RepVGG-D2se: 1/16, before the ReLU."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(1, channels // reduction), 1)
        self.expand = nn.Conv2d(max(1, channels // reduction), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()
