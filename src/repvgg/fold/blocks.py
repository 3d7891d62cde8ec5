"""Foldable blocks, each declared as a composition of standard modules; the fold follows from the parts (see as_linear.py).

A block is linear: a function `(in_channels, out_channels, stride, dilation, groups, padding_mode) -> module` whose module folds
into one 3x3 convolution. The activation and squeeze-excite belong to the layer around it: `act(se(block(x)))`. A new one is
declared like those below, and is then known by its name everywhere:

    @block
    def mine(g: Geometry) -> nn.Module:
        return Branches(conv_kxk=with_bn(g.conv()), conv_3x1=g.conv(3, 1))

    create_model("repvgg_b0", block="mine"); replace_conv(network, block="mine")

Sources: RepVGG (CVPR 2021), equation 1, Tables 6 and 7; those beyond it name theirs. `docs/blocks.md` draws them all.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, PaddingMode, ReparamError
from repvgg.fold.as_linear import Branches, Chain, as_linear, conv_map, register_convolution

Block = TypeVar("Block", bound=nn.Module)
BLOCKS: dict[str, Callable[..., nn.Module]] = {}
UNFOLDABLE = ("relu_in_branch",)  # trains, and has no deploy form


@dataclass(frozen=True)
class Geometry:
    """The geometry of a block: its channels, and how its 3x3 convolutions lie on the input (padding is always the dilation)."""

    in_channels: int
    out_channels: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    @property
    def keeps_shape(self) -> bool:
        return self.in_channels == self.out_channels and self.stride == 1

    def conv(self, rows: int = 3, columns: int = 3, kind: type[nn.Conv2d] = nn.Conv2d, bias: bool = False) -> nn.Conv2d:
        """Return a convolution of this geometry with a kernel of rows x columns, centred as the 3x3 is."""
        d = self.dilation
        padding = rows // 2 * d, columns // 2 * d
        size = self.in_channels, self.out_channels, (rows, columns)
        return kind(*size, self.stride, padding, d, self.groups, bias, self.padding_mode)

    def conv_1x1(self) -> nn.Conv2d:
        return Conv1x1(self.in_channels, self.out_channels, self.stride, self.groups)

    def padded_1x1(self, out_channels: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
        """Return the first of two: of stride 1, and doing the padding for the 3x3 that comes after it."""
        return kind(self.in_channels, out_channels, 1, 1, self.dilation, 1, self.groups, False, self.padding_mode)


def block(declare: Callable[[Geometry], Block]) -> Callable[..., Block]:
    """Decorator: enter a declaration in `BLOCKS` under its name. The block takes what `Geometry` does."""

    def make(
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
    ) -> Block:
        return declare(Geometry(in_channels, out_channels, stride, dilation, groups, padding_mode))

    make.__name__, make.__doc__ = declare.__name__, declare.__doc__
    BLOCKS[declare.__name__] = make
    return make


def find_block(name: str) -> Callable[..., nn.Module]:
    """Raises ValueError for an unknown name, listing those there are."""
    if name not in BLOCKS:
        raise ValueError(f"no block {name!r}: there are {', '.join(BLOCKS)}")
    return BLOCKS[name]


def deploy_conv(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> nn.Conv2d:
    """Return what each block folds into: one 3x3 convolution with bias."""
    return Geometry(in_channels, out_channels, stride, dilation, groups, padding_mode).conv(bias=True)


# ------------------------------------------------------------------------------------------------------------------- parts


@register_convolution
class Conv1x1(nn.Conv2d):
    """A 1x1 convolution without padding or bias that drops the pixels its stride skips before it multiplies, where it may train.

    The same as `nn.Conv2d`; but oneDNN's backward of a strided 1x1 corrupts the heap for 3 input channels in channels_last (seen
    with PyTorch 2.13 and 2.15 on x86), which is the stem's 1x1 branch. Without gradients it is `nn.Conv2d` to the last bit.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1) or not torch.is_grad_enabled():
            return F.conv2d(x, self.weight, stride=self.stride, groups=self.groups)
        kept = F.avg_pool2d(x, 1, self.stride)  # x[..., ::rows, ::columns], but its gradient stays in channels_last
        return F.conv2d(kept, self.weight, groups=self.groups)


class DerivedConv(nn.Conv2d):
    """A convolution without bias whose kernel is a function of its parameters, computed anew in each step."""

    formula: str

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the kernel, [out, in / groups, kh, kw], computed in `dtype` (by default the parameters' own)."""
        raise NotImplementedError

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Choose the parameters so that this is the kernel."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.kernel(), None)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.formula}"

    def delta(self, like: Tensor) -> Tensor:
        """Return the kernel of the identity on the first min(in, out) channels (of each group)."""
        rows, columns = self.kernel_size
        eye = torch.eye(self.out_channels // self.groups, like.shape[1], dtype=like.dtype, device=like.device)
        border = columns // 2, columns // 2, rows // 2, rows // 2
        return F.pad(eye.repeat(self.groups, 1)[..., None, None], border)


class IdentityPlusConv(DerivedConv):
    """Kernel I + W: an identity that needs no branch (Table 7's "trivial re-param"; as a 1x1, where DBB starts from)."""

    formula = "I + W"

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.weight.to(dtype or self.weight.dtype)
        return self.delta(weight) + weight

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        self.weight.copy_(kernel - self.delta(kernel))


class DiracConv(DerivedConv):
    """Kernel diag(a) I + diag(b) W_norm, where W_norm is W with each filter divided by its norm (DiracNet)."""

    formula = "aI + bW/|W|"

    def __init__(self, in_channels: int, out_channels: int, *geometry: Any) -> None:
        super().__init__(in_channels, out_channels, *geometry)
        self.a = nn.Parameter(torch.full((out_channels,), 1.0))
        self.b = nn.Parameter(torch.full((out_channels,), 0.1))

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        weight, a, b = (p.to(dtype or p.dtype) for p in (self.weight, self.a, self.b))
        return a.view(-1, 1, 1, 1) * self.delta(weight) + b.view(-1, 1, 1, 1) * F.normalize(weight.flatten(1)).view_as(weight)

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        self.weight.copy_(kernel - self.delta(kernel))
        self.a.fill_(1)
        self.b.copy_(self.weight.flatten(1).norm(dim=1))


@as_linear.register(IdentityPlusConv, DiracConv)
def _derived_conv(m: DerivedConv, channels: int | None) -> LinearMap:
    return replace(conv_map(m), kernel=m.kernel(torch.float64))


def with_bn(conv: nn.Conv2d) -> nn.Sequential:
    """`conv`, then batch norm."""
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels)))


def with_relu(branch: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(branch=branch, relu=nn.ReLU()))


def branches(g: Geometry, conv_kxk: nn.Module, conv_1x1: nn.Module | None = None, identity: nn.Module | None = None) -> Branches:
    """Declare the sum of these; the identity only where input and output have one shape."""
    named = {"conv_kxk": conv_kxk, "conv_1x1": conv_1x1, "identity": identity if g.keeps_shape else None}
    return Branches(**{name: module for name, module in named.items() if module is not None})


# ------------------------------------------------------------------------------------------------------ Tables 6 and 7


@block
def repvgg(g: Geometry) -> Branches:
    """3x3 + 1x1 + identity, each with batch norm; the identity only where input and output have one shape (equation 1)."""
    return branches(g, with_bn(g.conv()), with_bn(g.conv_1x1()), nn.BatchNorm2d(g.in_channels))


@block
def plain(g: Geometry) -> Branches:
    """3x3 with batch norm, and nothing else."""
    return branches(g, with_bn(g.conv()))


@block
def no_identity(g: Geometry) -> Branches:
    """3x3 + 1x1, each with batch norm."""
    return branches(g, with_bn(g.conv()), with_bn(g.conv_1x1()))


@block
def no_1x1(g: Geometry) -> Branches:
    """3x3 + identity, each with batch norm."""
    return branches(g, with_bn(g.conv()), identity=nn.BatchNorm2d(g.in_channels))


@block
def identity_no_bn(g: Geometry) -> Branches:
    """Declare the full block, without the batch norm of its identity."""
    return branches(g, with_bn(g.conv()), with_bn(g.conv_1x1()), nn.Identity())


@block
def post_bn(g: Geometry) -> Chain:
    """Declare one batch norm after the addition, in place of one in each branch."""
    return Chain(OrderedDict(sum=branches(g, g.conv(), g.conv_1x1(), nn.Identity()), bn=nn.BatchNorm2d(g.out_channels)))


@block
def relu_in_branch(g: Geometry) -> Branches:
    """Declare a ReLU in each branch, after its batch norm: trains a little better in the paper, and cannot be folded."""
    found = with_bn(g.conv()), with_bn(g.conv_1x1()), nn.BatchNorm2d(g.in_channels)
    return branches(g, *(with_relu(branch) for branch in found))


@block
def dirac(g: Geometry) -> Branches:
    """DiracNet's parametrised kernel (Zagoruyko and Komodakis 2017), then batch norm."""
    return branches(g, with_bn(g.conv(kind=DiracConv)))


@block
def trivial(g: Geometry) -> Branches:
    """Kernel I + W, then batch norm: the identity without a branch of its own."""
    return branches(g, with_bn(g.conv(kind=IdentityPlusConv)))


@block
def acb(g: Geometry) -> Branches:
    """Declare the asymmetric block of ACNet (Ding et al. 2019): 3x3 + 1x3 + 3x1, each with batch norm."""
    return Branches(conv_kxk=with_bn(g.conv()), conv_1x3=with_bn(g.conv(1, 3)), conv_3x1=with_bn(g.conv(3, 1)))


# -------------------------------------------------------------------------------------------------------- beyond the paper


@block
def dbb(g: Geometry) -> Branches:
    """Diverse Branch Block (Ding et al. 2021): 3x3 + 1x1 + (1x1, then 3x3) + (1x1, then average), batch norm after each part.

    Where a 1x1 comes first, it pads: so what lies around the map is zero before its batch norm, and that batch norm's shift after
    it, as the fold needs. (In train mode its statistics count that border.) An average has no dilation: raises `ReparamError`.
    """
    if g.dilation != 1:
        raise ReparamError("the block dbb has an average pool, which knows no dilation: choose another block here")
    first = g.padded_1x1(g.in_channels, IdentityPlusConv)
    nn.init.zeros_(first.weight)
    second = nn.Conv2d(g.in_channels, g.out_channels, 3, g.stride, groups=g.groups, bias=False)
    average = OrderedDict(
        first=with_bn(g.padded_1x1(g.out_channels)), pool=nn.AvgPool2d(3, g.stride), bn=nn.BatchNorm2d(g.out_channels)
    )
    return Branches(
        conv_kxk=with_bn(g.conv()),
        conv_1x1=with_bn(g.conv_1x1()),
        conv_1x1_kxk=nn.Sequential(OrderedDict(first=with_bn(first), second=with_bn(second))),
        average=nn.Sequential(average),
    )


@block
def mobileone(g: Geometry) -> Branches:
    """MobileOne's block (Vasu et al. 2023): four times 3x3 + 1x1 + identity, each with batch norm."""
    full = repvgg(*astuple(g))
    more = {f"conv_kxk_{i}": with_bn(g.conv()) for i in (2, 3, 4)}
    return Branches(**dict(full.named_children()), **more)


@block
def qarepvgg(g: Geometry) -> Chain:
    """QARepVGG's block (Chu et al. 2024), which survives INT8: 1x1 and identity without batch norm, and one after the addition."""
    return Chain(OrderedDict(sum=branches(g, with_bn(g.conv()), g.conv_1x1(), nn.Identity()), bn=nn.BatchNorm2d(g.out_channels)))


class SqueezeExcite(nn.Module):
    """Channels rescaled by a two-layer network of their means (Hu et al. 2018), as in RepVGG-D2se: 1/16, before the ReLU."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, max(1, channels // reduction), 1)
        self.expand = nn.Conv2d(max(1, channels // reduction), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()
