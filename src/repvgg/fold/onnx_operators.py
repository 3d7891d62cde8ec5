"""The ONNX operators that are linear, as operators of a computation (flow.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch.nn.functional as F
from onnx import NodeProto, helper
from torch import Tensor

from repvgg.fold.algebra import LinearMap, Pair, ReparamError, batch_norm
from repvgg.fold.flow import Value
from repvgg.fold.operators import Operator, concatenated, convolved, normed, padded, picked, pooled, same, scaled, strided, summed

Pads = list[int]
MOST_CHANNELS, MOST_SIDE = 1 << 20, 1 << 10  # beyond which no network is, and a stranger's file would take all memory
LONGEST = 2**31 - 1  # an end that no map reaches, as exporters write it


@dataclass
class Node:
    """A node, its constants, and the values that go in."""

    proto: NodeProto
    constant: Callable[[str], Tensor | None]
    inputs: tuple[Value, ...]

    @cached_property
    def attributes(self) -> dict[str, Any]:
        return {a.name: helper.get_attribute_value(a) for a in self.proto.attribute}

    def get(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)

    def given(self, at: int) -> Tensor | None:
        """Return the constant that goes in at this place, if any does."""
        name = self.proto.input[at] if at < len(self.proto.input) else ""
        return self.constant(name) if name else None

    def needed(self, at: int) -> Tensor:
        found = self.given(at)
        if found is None:
            raise ReparamError("has a tensor that is computed from the inputs")
        return found

    def whole(self, name: str, at: int) -> list[int]:
        """Integers that are an attribute in old opsets and a constant input in newer ones."""
        return [int(n) for n in self.get(name, None) or (self.needed(at).flatten().tolist())]


Found = tuple[list[Operator], Pads | None]


def _conv(node: Node) -> Found:
    weight, bias = node.needed(1), node.given(2)
    if weight.dim() != 4:
        raise ReparamError(f"is {weight.dim() - 2}-dimensional")
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    _refuse_nonfinite(weight, bias)
    stride, dilation = _pair(node.get("strides", [1, 1])), _pair(node.get("dilations", [1, 1]))
    groups = int(node.get("group", 1))
    if weight.shape[0] % groups or bias.numel() != weight.shape[0]:
        raise ReparamError("has sizes that do not fit each other")
    padding, uneven = _pads(node, (weight.shape[2], weight.shape[3]), stride, dilation)
    m = LinearMap(weight, bias, stride, padding, dilation, groups)
    run = lambda x: F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # noqa: E731
    return [convolved(lambda: m, run, weight.shape, groups)], uneven


def _pads(node: Node, kernel: Pair, stride: Pair, dilation: Pair) -> tuple[Pair, Pads | None]:
    """Padding that is even; or uneven, then as four numbers."""
    auto = node.get("auto_pad", b"NOTSET")
    pads = [int(p) for p in node.get("pads", [0, 0, 0, 0])]
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if stride != (1, 1):
            raise ReparamError("pads by the size of the image (auto_pad)")
        small, large = [r // 2 for r in reach], [r - r // 2 for r in reach]
        pads = small + large if auto == b"SAME_UPPER" else large + small
    elif auto == b"VALID":
        pads = [0, 0, 0, 0]
    if min(pads) < 0 or max(pads) > MOST_SIDE or len(pads) != 4:
        raise ReparamError("pads by less than nothing, or by too much")
    return ((pads[0], pads[1]), None) if pads[:2] == pads[2:] else ((0, 0), pads)


def _batch_norm(node: Node) -> Found:
    if node.get("training_mode", 0) or not node.get("is_test", 1) or len([o for o in node.proto.output if o]) > 1:
        raise ReparamError("is in training mode: export the model after .eval()")
    weight, bias, mean, var = (node.needed(at) for at in (1, 2, 3, 4))
    eps = float(node.get("epsilon", 1e-5))
    _refuse_nonfinite(weight, bias, mean, var)
    if bool((var < 0).any() | (var + eps <= 0).any()):
        raise ReparamError("holds a variance that is not positive: the file is damaged", node.proto.input[4])
    m = batch_norm(mean, var, eps, weight, bias)
    return [normed(lambda: m, lambda x: F.batch_norm(x, mean, var, weight, bias, eps=eps), weight.numel())], None


def _sum(node: Node) -> Found:
    """A sum of values, or of one value and a constant."""
    return _combined(node, 1, 1)


def _difference(node: Node) -> Found:
    return _combined(node, 1, -1)


def _combined(node: Node, *signs: int) -> Found:
    if len(node.inputs) == len(node.proto.input):
        return [summed(*(signs if len(signs) == len(node.inputs) else [1] * len(node.inputs)))], None
    if len(node.proto.input) != 2:
        raise ReparamError("adds a constant to several values")
    first, second = node.given(0), node.given(1)
    one = Tensor([1.0])
    if second is not None:
        return [scaled(one, _per_channel(second) * signs[1])], None
    assert first is not None
    return [scaled(one * signs[1], _per_channel(first))], None


def _product(node: Node) -> Found:
    constant = node.given(0) if node.given(1) is None else node.given(1)
    if constant is None:
        raise ReparamError("multiplies two values")
    return [scaled(_per_channel(constant), Tensor([0.0]))], None


def _quotient(node: Node) -> Found:
    return [scaled(1 / _per_channel(node.needed(1)), Tensor([0.0]))], None


def _per_channel(constant: Tensor) -> Tensor:
    """One number, or one for each channel."""
    shape = constant.shape
    if constant.numel() != 1 and not (len(shape) in (3, 4) and shape[-2:] == (1, 1) and (len(shape) == 3 or shape[0] == 1)):
        raise ReparamError("has a constant that differs from pixel to pixel")
    _refuse_nonfinite(constant)
    return constant.flatten()


def _unchanged(node: Node) -> Found:
    return [same()], None


def _dropout(node: Node) -> Found:
    mode = node.given(2)
    if len(node.proto.output) > 1 or (mode is not None and bool(mode.any())) or len(node.inputs) > 1:
        raise ReparamError("is in training mode: export the model after .eval()")
    return [same()], None


def _average(node: Node) -> Found:
    size, stride = _pair(node.get("kernel_shape", [])), _pair(node.get("strides", [1, 1]))
    padding, uneven = _pads(node, size, stride, (1, 1))
    counted = node.get("count_include_pad", 0) or not any(padding)
    if node.get("ceil_mode", 0) or uneven or not counted or any(d != 1 for d in node.get("dilations", [1])):
        raise ReparamError("with ceil_mode, or padding that is not counted, is not one linear map at the border")
    return [pooled(size, stride, padding)], None


def _pad(node: Node) -> Found:
    pads = node.whole("pads", 1)
    value = node.given(2)
    fill = float(node.get("value", 0.0)) if value is None else float(value)
    even = len(pads) == 8 and pads[:4] == pads[4:] and pads[:2] == [0, 0] and min(pads) >= 0 and max(pads) <= MOST_SIDE
    if node.get("mode", b"constant") != b"constant" or fill or not even or node.given(3) is not None:
        raise ReparamError("is uneven, or pads with something else than zeros")
    return [padded(pads[2], pads[3])], None


def _concat(node: Node) -> Found:
    if node.get("axis", None) != 1 or len(node.inputs) < len(node.proto.input):
        raise ReparamError("is not along the channels, or takes in a constant")
    return [concatenated()], None


def _split(node: Node) -> Found:
    if node.get("axis", 0) != 1:
        raise ReparamError("is not along the channels")
    sizes = node.whole("split", 1)
    if min(sizes, default=-1) < 0 or sum(sizes) > MOST_CHANNELS:
        raise ReparamError("has sizes that do not fit each other")
    ends = list(accumulate(sizes, initial=0))
    return [picked(range(a, b)) for a, b in pairwise(ends)], None


def _gather(node: Node) -> Found:
    index = node.needed(1)
    if node.get("axis", 0) != 1 or index.dim() != 1 or bool((index < 0).any()):
        raise ReparamError("is not along the channels")
    return [picked(int(i) for i in index)], None


def _slice(node: Node) -> Found:
    """Channels from one to another, or every n-th row or column."""
    starts, ends = node.whole("starts", 1), node.whole("ends", 2)
    axes = node.whole("axes", 3) if "axes" in node.attributes or node.given(3) is not None else list(range(len(starts)))
    steps = node.whole("steps", 4) if node.given(4) is not None else [1] * len(starts)
    found: list[Operator] = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if axis == 1 and step == 1 and 0 <= start < end <= MOST_CHANNELS:
            found.append(picked(range(start, end)))
        elif axis in (2, 3) and start == 0 and step > 0 and end >= LONGEST:
            found.append(strided(step if axis == 2 else 1, step if axis == 3 else 1))
        else:
            raise ReparamError("takes out something else than channels, or every n-th row or column")
    if len(found) != 1:
        raise ReparamError("takes out along several axes at once")
    return found, None


def _refuse_nonfinite(*tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ReparamError("holds NaN or Inf: the file is damaged, or training diverged", "a tensor")


def _pair(values: Any) -> Pair:
    if len(values) != 2:
        raise ReparamError("is not two-dimensional")
    if not all(0 <= int(value) <= MOST_SIDE for value in values):
        raise ReparamError("is larger than any that is folded")
    return int(values[0]), int(values[1])


READERS: dict[str, Callable[[Node], Found]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Add": _sum,
    "Sum": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "Identity": _unchanged,
    "Dropout": _dropout,
    "AveragePool": _average,
    "Pad": _pad,
    "Concat": _concat,
    "Split": _split,
    "Gather": _gather,
    "Slice": _slice,
}
