"""Read a module tree as one linear map, and write the map as one convolution.

`as_linear(module)` dispatches on the *exact* type of each module: a subclass may do something else, so it is refused until its
author says what it means:

    @as_linear.register(MyBlock)
    def _(module, channels): return add(as_linear.child("a", module.a, channels), as_linear.child("b", module.b, channels))
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, Pair, ReparamError, add, average, batch_norm, compose, identity
from repvgg.fold.guards import altered, inside, is_finite, parts, refuse_damage, refuse_train_mode

Reader = Callable[[Any, int | None], LinearMap]


class Branches(nn.Module):
    """Add up the outputs of its children, all applied to the same input (equation 1). It folds if each of them does."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Iterator[Tensor] = (branch(x) for _, branch in parts(self))  # one at a time: fewer are alive at once
        return reduce(torch.add, outputs)

    def fuse(self) -> nn.Conv2d:
        """Return the convolution that this block folds into; timm's own `reparameterize_model` asks for it by this name."""
        return fused(self)


class Chain(nn.Sequential):
    """Apply its children one after the other, as one block: it folds whole or is refused. A plain Sequential folds part by part."""

    def fuse(self) -> nn.Conv2d:
        """Return the convolution that this block folds into, as `Branches.fuse` does."""
        return fused(self)


class _AsLinear:
    """Read a module tree as the linear map that it is in eval mode, in float64: `as_linear(module, channels=None) -> LinearMap`.

    `channels` tells modules that fit any number of channels (an identity, a pool) how many they see. Raises `ReparamError` for
    what is not linear, is in train mode, carries hooks, or holds non-finite numbers. Readers of a module that has parts use
    `as_linear.child`, so that errors name the part by its path.
    """

    def __init__(self) -> None:
        self._readers: dict[type | str, Reader] = {}

    def register(self, *types: type | str) -> Callable[[Reader], Reader]:
        """Say what modules of exactly these types mean; a type may be named "module.Class" to spare its import."""

        def remember(reader: Reader) -> Reader:
            self._readers.update(dict.fromkeys(types, reader))
            return reader

        return remember

    @property
    def types(self) -> list[type]:
        return [t for t in self._readers if isinstance(t, type)]

    def reader(self, module: nn.Module) -> Reader | None:
        cls = type(module)
        return self._readers.get(cls) or self._readers.get(f"{cls.__module__}.{cls.__qualname__}")

    def __call__(self, module: nn.Module, channels: int | None = None) -> LinearMap:
        refuse_train_mode(module)
        return self.read(module, channels)

    def read(self, module: nn.Module, channels: int | None = None) -> LinearMap:
        """Read a module as `as_linear` does, at the running statistics even in train mode."""
        reader = self.reader(module)
        if reader is None:
            raise ReparamError(why_unknown(module))
        if reason := altered(module):
            raise ReparamError(reason)
        refuse_damage(module)
        return reader(module, channels)

    def child(self, name: str, module: nn.Module, channels: int | None) -> LinearMap:
        """Read the part `name` of a larger module: errors say so."""
        with inside(name):
            return self.read(module, channels)


as_linear = _AsLinear()


# ---------------------------------------------------------------------- what the known types mean


@as_linear.register(nn.Conv2d)
def _convolution(m: nn.Conv2d, channels: int | None) -> LinearMap:
    return conv_map(m)


def conv_map(m: nn.Conv2d) -> LinearMap:
    """Return a convolution's parameters and geometry as a map."""
    bias = m.weight.new_zeros(m.out_channels) if m.bias is None else m.bias
    return LinearMap(
        m.weight.double(),
        bias.double(),
        two(m.stride),
        conv_padding(m),
        two(m.dilation),
        m.groups,
        m.padding_mode,
    )


NO_STATISTICS = "has no running statistics (track_running_stats=False), so its output depends on the batch"


@as_linear.register(nn.BatchNorm2d, nn.SyncBatchNorm, "torchvision.ops.misc.FrozenBatchNorm2d")
def _batch_norm(m: nn.BatchNorm2d, channels: int | None) -> LinearMap:
    if m.running_mean is None or m.running_var is None:
        raise ReparamError(NO_STATISTICS)
    impossible = (m.running_var < 0) | (m.running_var + m.eps <= 0)  # zero is a channel that never varied, and eps stands beside it
    if bool(impossible.any()):
        channel = int(impossible.nonzero()[0])
        raise ReparamError(
            f"is {float(m.running_var[channel]):g} in channel {channel}; a variance is not negative, and positive with "
            f"eps={m.eps:g} added. The checkpoint is damaged: re-estimate the statistics",
            "running_var",
        )
    return batch_norm(m.running_mean, m.running_var, m.eps, m.weight, m.bias)


@as_linear.register("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
def _batch_norm_act(m: nn.BatchNorm2d, channels: int | None) -> LinearMap:
    if _activation_of(m) is not None:
        raise ReparamError("has an activation inside, which is not linear: move it out of the block")
    return _batch_norm(m, channels)


@as_linear.register(nn.Identity, nn.Dropout, nn.Dropout2d)
def _identity(m: nn.Module, channels: int | None) -> LinearMap:
    return identity(_needed(channels))


BORDER = "with ceil_mode, or padding that is not counted, is not one linear map at the border"


@as_linear.register(nn.AvgPool2d)
def _average_pool(m: nn.AvgPool2d, channels: int | None) -> LinearMap:
    padding = two(m.padding)
    if m.ceil_mode or (any(padding) and not m.count_include_pad):
        raise ReparamError(BORDER)
    return average(_needed(channels), two(m.kernel_size), two(m.stride), padding, m.divisor_override)


@as_linear.register(nn.Sequential, Chain)
def _sequential(m: nn.Sequential, channels: int | None) -> LinearMap:
    channels = channels or _channels_into(m)
    maps: list[LinearMap] = []
    for name, child in parts(m):
        maps.append(as_linear.child(name, child, maps[-1].out_channels if maps else channels))
    return compose(*_on_one_device(maps)) if maps else identity(_needed(channels))


@as_linear.register(Branches)
def _branches(m: Branches, channels: int | None) -> LinearMap:
    channels = channels or _channels_into(m)
    return add(*_on_one_device([as_linear.child(name, child, channels) for name, child in parts(m)]))


CONVOLUTIONS: set[type] = {nn.Conv2d}


def register_convolution(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Register a subclass (class decorator) that computes what `nn.Conv2d` with the same parameters does, in another way."""
    as_linear.register(cls)(_convolution)
    CONVOLUTIONS.add(cls)
    return cls


def equivalent_kernel(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the kernel [out, in / groups, kh, kw] and bias [out] of a block: float64, differentiable in its parameters.

    Batch norms count at their running statistics, in train mode too, so that a loss may be put on the folded kernel.
    """
    m = as_linear.read(block)
    return m.kernel, m.bias


# ---------------------------------------------------------------------- questions about modules


def is_foldable(module: nn.Module) -> bool:
    """Tell whether `reparameterize` would replace this module as one block; a conv or a BN alone is already one operator."""
    if as_linear.reader(module) is None or is_batch_norm(module) or type(module) in (nn.Sequential, *CONVOLUTIONS):
        return False
    return bool(floats(module))  # an identity or a pool has nothing to fold


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is of a type whose affine part we know; a stranger's subclass is not."""
    return as_linear.reader(module) in (_batch_norm, _batch_norm_act)


def resembles_batch_norm(module: nn.Module) -> bool:
    return is_batch_norm(module) or isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))


def split_activation(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the affine part of a batch norm, and what it does after that (timm's BatchNormAct2d has an activation inside)."""
    if not parts(norm):
        return norm, nn.Identity().eval()
    affine = copy.deepcopy(norm)
    for name, _ in parts(affine):
        affine._modules[name] = nn.Identity()
    return affine, _activation_of(norm) or nn.Identity().eval()


def _activation_of(norm: nn.Module) -> nn.Module | None:
    """Return what timm's BatchNormAct2d does after its batch norm, if anything."""
    after = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return nn.Sequential(*after).eval() if len(after) > 1 else after[0] if after else None


def why_unknown(module: nn.Module) -> str:
    cls = type(module).__name__
    if hasattr(module, "parametrizations"):
        return f"{cls} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    known = next((t for t in as_linear.types if isinstance(module, t)), None)
    if known is not None:
        return f"{cls} is a subclass of {known.__name__} and may compute something else: as_linear.register says what"
    return f"{cls} is not known to be linear: move it out of the block, or say what it means with as_linear.register"


def conv_padding(m: nn.Conv2d) -> Pair:
    """Return the padding of a convolution as two numbers of pixels, "same" and "valid" resolved."""
    return in_pixels(m.padding, m.kernel_size, m.dilation)


def in_pixels(padding: str | int | tuple[int, ...], kernel_size: tuple[int, ...], dilation: int | tuple[int, ...]) -> Pair:
    """Return a padding as two numbers of pixels. Raises `ReparamError` where "same" pads one side more than the other."""
    if not isinstance(padding, str):
        return two(padding)
    rows, columns = (d * (k - 1) * (padding == "same") for k, d in zip(two(kernel_size), two(dilation), strict=True))
    if rows % 2 or columns % 2:
        raise ReparamError(UNEVEN)
    return rows // 2, columns // 2


UNEVEN = 'with padding="same" and an even kernel pads one side more than the other'


# ---------------------------------------------------------------------- a map as a convolution


def as_conv(m: LinearMap, like: Tensor) -> nn.Conv2d:
    """Write the map as a convolution with bias, in eval mode; in dtype, device, memory format and `requires_grad` as `like`."""
    conv: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d,
        m.in_channels,
        m.out_channels,
        m.kernel_size,
        stride=m.stride,
        padding=m.padding,
        dilation=m.dilation,
        groups=m.groups,
        padding_mode=m.padding_mode,
        device=like.device,
        dtype=like.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(m.kernel)
        assert conv.bias is not None
        conv.bias.copy_(m.bias)
    for name, tensor in conv.named_parameters():
        if not is_finite(tensor):
            raise ReparamError(f"the folded {name} does not fit {like.dtype}: convert the model to float32 first")
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return conv.requires_grad_(like.requires_grad).eval()


@torch.no_grad()
def fused(block: nn.Module) -> nn.Conv2d:
    """Return a block in eval mode as one convolution. `reparameterize` proves what it folds besides."""
    return as_conv(as_linear(block), like=main_tensor(block))


def floats(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def main_tensor(module: nn.Module) -> Tensor:
    """Return its largest kernel: what has the dtype, device and memory format that the module is in."""
    return max(floats(module), key=lambda t: (t.dim() == 4, t.numel()))


# ---------------------------------------------------------------------- helpers


def two(value: Any) -> Pair:
    """Return what a module may hold as one number or as two, as two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _needed(channels: int | None) -> int:
    if channels is None:
        raise ReparamError("fits any number of channels: pass as_linear(module, channels)")
    return channels


def _channels_into(module: nn.Module) -> int | None:
    """Return the input channels of the first module inside that fixes them."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            return m.in_channels
        if is_batch_norm(m):
            return int(m.running_mean.numel()) if m.running_mean is not None else None  # type: ignore[operator]
    return None


def _on_one_device(maps: list[LinearMap]) -> list[LinearMap]:
    """Put an identity or a pool, which has no tensors to say where it lives, where the others are."""
    device = next((m.kernel.device for m in maps if m.kernel.device.type != "cpu"), torch.device("cpu"))
    return [replace(m, kernel=m.kernel.to(device), bias=m.bias.to(device)) for m in maps]
