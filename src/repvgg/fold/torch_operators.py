"""The modules and functions of PyTorch that are linear, as operators of a computation (flow.py)."""

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, Pair, ReparamError, batch_norm
from repvgg.fold.as_linear import (
    BORDER,
    CONVOLUTIONS,
    NO_STATISTICS,
    as_linear,
    conv_padding,
    in_pixels,
    is_batch_norm,
    resembles_batch_norm,
    split_activation,
    two,
    why_unknown,
)
from repvgg.fold.guards import altered, inside, refuse_damage
from repvgg.fold.operators import (
    Operator,
    concatenated,
    convolved,
    mapped,
    normed,
    padded,
    picked,
    pooled,
    same,
    scaled,
    strided,
    summed,
)

Reader = Callable[..., Operator | list[Operator]]  # takes a call's arguments, inputs as `Input`
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Input:
    """In the arguments of a call: something that is computed."""

    def __init__(self, at: int) -> None:
        self.at = at


def of_module(module: nn.Module, path: str) -> Operator | None:
    """Return the operator that a module is, if it is one by itself. Raises `ReparamError` where it looks like one and is not."""
    cls = type(module).__name__
    looks = isinstance(module, nn.Conv2d) or resembles_batch_norm(module)
    if reason := altered(module):
        if looks or type(module) in NOTHING:
            raise ReparamError(f"its {cls} {reason}")
        return None
    if looks and hasattr(module, "parametrizations"):
        raise ReparamError(f"its {why_unknown(module)}")
    if type(module) in CONVOLUTIONS:
        assert isinstance(module, nn.Conv2d)
        if module.weight.is_complex():
            raise ReparamError(f"its {cls} has a kernel of complex numbers")
        try:
            conv_padding(module)
        except ReparamError as error:
            raise ReparamError(f"its {cls} {error.reason}") from None
        return convolved(_read(module, path), _run(module), module.weight.shape, module.groups)
    if is_batch_norm(module):
        if module.running_mean is None:
            raise ReparamError(f"its {cls} {NO_STATISTICS}")
        affine, _ = split_activation(module)
        return normed(_read(affine, path), _run(affine), len(module.running_mean))  # type: ignore[arg-type]
    if resembles_batch_norm(module):
        raise ReparamError(f"its {why_unknown(module)}")
    if type(module) in NOTHING:
        return same()
    if as_linear.reader(module) is None or type(module) is nn.Sequential:
        return None
    return mapped("other", lambda channels: as_linear.child(path, module, channels), _run(module))


def of_flat(module: nn.Module) -> Operator | None:
    """Return the operator that a module is on values [N, C], seen as maps [N, C, 1, 1], if it is a batch norm or a linear layer."""
    if type(module) not in FLAT or altered(module) or hasattr(module, "parametrizations"):
        return None
    refuse_damage(module)
    if isinstance(module, nn.Linear):
        found = _conv(None, module.weight[:, :, None, None], module.bias)
        return replace(found, run=lambda x: _exact(module, x)(x.movedim(1, -1)).movedim(-1, 1))
    assert isinstance(module, nn.BatchNorm1d)
    norm = _batch_norm(None, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)
    return replace(norm, run=lambda x: _exact(module, x)(x.flatten(2)).view_as(x))


FLAT = (nn.Linear, nn.BatchNorm1d)


def makes_flat(what: Any, *arguments: Any, **named: Any) -> bool:
    """Tell whether a module, or a function or method of this name, makes [N, C] of a feature map."""
    if isinstance(what, nn.Module):
        return type(what) is nn.Flatten and (what.start_dim, what.end_dim) == (1, -1)
    if what == "flatten":
        return [*arguments, *named.values()] in ([1], [1, -1])
    dims = named.get("dim", arguments[0] if arguments else None)
    return what == "mean" and dims in ((2, 3), [2, 3], (-2, -1), [-2, -1]) and not (named.get("keepdim") or arguments[1:])


def _read(module: nn.Module, path: str) -> Callable[[], LinearMap]:
    def read() -> LinearMap:
        with inside(path):
            return as_linear.read(module)

    return read


def _run(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: _exact(module, x)(x)


def _exact(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in float64 where `x` is: a network may lie on several devices."""
    return copy.deepcopy(module).double().to(x.device)


# ---------------------------------------------------------------------------------------------------------------- functions


def _add(a: Any, b: Any, alpha: float = 1) -> Operator:
    if isinstance(a, Input) and isinstance(b, Input):
        return scaled_sum(1, alpha)
    return scaled(_one(), _constant(b) * alpha) if isinstance(a, Input) else scaled(_one() * alpha, _constant(a))


def _sub(a: Any, b: Any) -> Operator:
    if isinstance(a, Input) and isinstance(b, Input):
        return summed(1, -1)
    return scaled(_one(), -_constant(b)) if isinstance(a, Input) else scaled(-_one(), _constant(a))


def scaled_sum(*factors: float) -> Operator:
    if any(f not in (1, -1) for f in factors):
        raise ReparamError("adds with a factor")
    return summed(*(int(f) for f in factors))


def _mul(a: Any, b: Any) -> Operator:
    if isinstance(a, Input) and isinstance(b, Input):
        raise ReparamError("multiplies two values")
    return scaled(_constant(b if isinstance(a, Input) else a), _one() * 0)


def _div(a: Any, b: Any) -> Operator:
    if isinstance(b, Input):
        raise ReparamError("divides by a value")
    return scaled(1 / _constant(b), _one() * 0)


def _neg(a: Any) -> Operator:
    return scaled(-_one(), _one() * 0)


def _one() -> Tensor:
    return torch.ones(1, dtype=torch.float64)


def _constant(value: Any) -> Tensor:
    """One number, or one for each channel."""
    if isinstance(value, (int, float)):
        return torch.tensor([float(value)], dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise ReparamError("takes in something else than a number or a tensor")
    shape = value.shape
    if value.numel() != 1 and not (len(shape) in (3, 4) and shape[-2:] == (1, 1) and (len(shape) == 3 or shape[0] == 1)):
        raise ReparamError("has a constant that differs from pixel to pixel")
    return value.detach().double().flatten()


def _cat(tensors: Any, dim: int = 0) -> Operator:
    if dim != 1 or not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Input) for t in tensors):
        raise ReparamError("is not along the channels, or takes in a constant")
    return concatenated()


def _split(x: Any, sizes: Any, dim: int = 0) -> list[Operator]:
    if dim != 1 or not isinstance(sizes, (list, tuple)) or not all(isinstance(n, int) for n in sizes):
        raise ReparamError("is not along the channels, or into an unknown number of parts")
    return [picked(range(a, b)) for a, b in pairwise(accumulate(sizes, initial=0))]


def _getitem(x: Any, index: Any) -> Operator:
    """Return the operator of `x[:, a:b]`, or of `x[..., ::n, ::n]`."""
    if isinstance(index, tuple) and (steps := _steps(index)) is not None:
        return strided(*steps)
    if not isinstance(index, tuple) or len(index) < 2 or any(i != slice(None) for n, i in enumerate(index) if n != 1):
        raise ReparamError("takes out something else than channels")
    channels = index[1]
    if not isinstance(channels, slice) or not isinstance(channels.stop, int) or channels.step not in (None, 1):
        raise ReparamError("takes out an unknown number of channels")
    start = channels.start or 0
    if not isinstance(start, int) or start < 0 or channels.stop <= start:
        raise ReparamError("counts channels from the end")
    return picked(range(start, channels.stop))


def _steps(index: tuple[Any, ...]) -> Pair | None:
    """Return n and m of `x[..., ::n, ::m]` and `x[:, :, ::n, ::m]`, the whole of images and channels; else None."""
    leading, last = index[:-2], index[-2:]
    if leading not in ((...,), (slice(None), slice(None))) or not all(isinstance(s, slice) for s in last):
        return None
    steps = [s.step or 1 for s in last]
    from_the_first = all(s.start in (None, 0) and s.stop is None for s in last)
    return two(steps) if from_the_first and all(isinstance(n, int) and n > 0 for n in steps) else None


def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Operator:
    even = len(pad) == 4 and pad[0] == pad[1] and pad[2] == pad[3] and all(isinstance(p, int) and p >= 0 for p in pad)
    if mode != "constant" or value or not even:
        raise ReparamError("is uneven, or pads with something else than zeros")
    return padded(pad[2], pad[0])


def _pool(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
          count_include_pad: bool = True, divisor_override: int | None = None) -> Operator:  # fmt: skip
    size, step, around = (two(v) for v in (kernel_size, stride or kernel_size, padding))
    if ceil_mode or (any(around) and not count_include_pad):
        raise ReparamError(BORDER)
    return pooled(size, step, around, divisor_override)


def _conv(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Operator:
    if not isinstance(weight, Tensor) or isinstance(bias, Input):
        raise ReparamError("has a kernel that is computed")
    if weight.is_complex():
        raise ReparamError("has a kernel of complex numbers")
    weight = weight.detach().double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    geometry = two(stride), in_pixels(padding, weight.shape[2:], dilation), two(dilation), groups
    run = lambda x: F.conv2d(x, weight.to(x.device), bias.to(x.device), *geometry)  # noqa: E731
    return convolved(lambda: LinearMap(weight, bias, *geometry), run, weight.shape, groups)


def _batch_norm(x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Operator:  # fmt: skip
    if any(isinstance(t, Input) for t in (running_mean, running_var, weight, bias)):
        raise ReparamError("has statistics or weights that are computed")
    mean, var, gain, shift = (None if t is None else t.detach().double() for t in (running_mean, running_var, weight, bias))
    if training is not False or mean is None or var is None or bool((var < 0).any() | (var + eps <= 0).any()):
        raise ReparamError("has no statistics, or a negative variance")

    def run(x: Tensor) -> Tensor:
        m, v, g, s = (None if t is None else t.to(x.device) for t in (mean, var, gain, shift))
        return F.batch_norm(x, m, v, g, s, False, 0.0, eps)

    return normed(lambda: batch_norm(mean, var, eps, gain, shift), run, len(mean))


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Operator:
    if training is not False:
        raise ReparamError("is a dropout in train mode")
    return same()


def _unchanged(x: Any, *arguments: Any, **named: Any) -> Operator:
    return same()


FUNCTIONS: dict[Any, Reader] = {
    **dict.fromkeys([operator.add, operator.iadd, torch.add, "add", "add_"], _add),
    **dict.fromkeys([operator.sub, operator.isub, torch.sub, "sub", "sub_"], _sub),
    **dict.fromkeys([operator.mul, operator.imul, torch.mul, "mul", "mul_"], _mul),
    **dict.fromkeys([operator.truediv, operator.itruediv, torch.div, "div", "div_"], _div),
    **dict.fromkeys([operator.neg, torch.neg, "neg"], _neg),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], _cat),
    **dict.fromkeys([torch.split, "split"], _split),
    **dict.fromkeys(["contiguous"], _unchanged),
    **dict.fromkeys([F.dropout, F.dropout2d], _dropout),
    operator.getitem: _getitem,
    F.pad: _pad,
    F.avg_pool2d: _pool,
    F.conv2d: _conv,
    torch.conv2d: _conv,
    F.batch_norm: _batch_norm,
}
