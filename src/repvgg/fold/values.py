"""Stand for the values in a trace of a forward, which has none: what may be asked of one, and what is done to it in place."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from repvgg.fold.as_linear import CONVOLUTIONS, is_batch_norm
from repvgg.fold.call import TENSOR

VALUE = "repvgg.value"  # in a node's meta: the answers that led to it, and its name: the same each time


class AsksTypeError(TypeError):
    """A forward asks (`isinstance`) of what type the value of `node` is, and nobody has said."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__("it asks what type a value is")
        self.node, self.value = node, node.meta.get(VALUE)


class AsksPartsError(fx.proxy.TraceError):
    """A forward asks for the parts of the value of `node`, and nobody has said how many there are."""

    def __init__(self, why: str, node: fx.Node) -> None:
        super().__init__(why)
        self.node, self.value = node, node.meta.get(VALUE)


class ValueOf(fx.Proxy):
    """Stand for a value in a trace. A forward that asks (`isinstance`) what type it has is told of tensors alone."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override, misc]
        if not self.tracer.watching:  # type: ignore[attr-defined]
            return ValueOf
        if self.node.meta.get(TENSOR):
            return Tensor
        with self.tracer._refusing():  # type: ignore[attr-defined]
            raise AsksTypeError(self.node)

    def __getattr__(self, name: str) -> Any:
        return AttributeOf(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse `x.data = y`, of which a trace sees nothing."""
        if name not in ("node", "tracer", "_node"):  # fx's own
            with self.tracer._refusing():  # type: ignore[attr-defined]
                raise ValueError(f"it sets `{name}` of a value")
        super().__setattr__(name, value)

    def __index__(self) -> int:
        with self.tracer._refusing():  # type: ignore[attr-defined]
            raise ValueError("it takes a number out of a value")

    __int__ = __float__ = __index__  # type: ignore[assignment]

    def changed(self, how: Callable[..., Any], plain: Callable[..., Any], other: Any) -> Any:
        """Return what `how` makes of the value in place; of a number, what `plain` does."""
        return self.tracer.create_proxy("call_function", plain if is_size(self.node) else how, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        if (parts := parts_of(self.node)) is not None:
            return parts
        with self.tracer._refusing():  # type: ignore[attr-defined]
            raise AsksPartsError("it asks how long a value is", self.node)

    def __eq__(self, other: Any) -> Any:
        return False if other is None and is_size(self.node) else super().__eq__(other)

    def __ne__(self, other: Any) -> Any:
        return True if other is None and is_size(self.node) else super().__ne__(other)

    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Any:
        return [*self, *other] if type(other) is list else super().__add__(other)  # type: ignore[misc]

    def __radd__(self, other: Any) -> Any:
        return [*other, *self] if type(other) is list else super().__radd__(other)  # type: ignore[misc]


class AttributeOf(ValueOf, fx.proxy.Attribute):  # type: ignore[misc]
    """Stand for an attribute of a value, or for a method that is called next."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        vars(self).update(root=root, attr=attr, tracer=root.tracer, _node=None)


# `x += y` and its like, which fx takes for `x = x + y`: by the plain operator
IN_PLACE = {
    getattr(operator, name, None) or getattr(operator, f"{name}_"): getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
for _plain, _how in IN_PLACE.items():
    setattr(ValueOf, f"__{_how.__name__}__", lambda a, b, how=_how, plain=_plain: a.changed(how, plain, b))


def is_size(node: fx.Node) -> bool:
    """Tell whether a value is a number or a tuple, which nothing changes in place: a size, or what was made of sizes."""
    if node.op == "call_method" or node.target is getattr:
        return (node.target if node.op == "call_method" else node.args[1]) in ("size", "shape", "dim", "ndim", "numel")
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def parts_of(node: fx.Node) -> int | None:
    """Return how many parts a value has, where the call that makes it says so (of `x.shape[:2]`, if it has them)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    how = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None)
    if name == "chunk" and isinstance(how, int):
        return how
    if name == "getitem" and isinstance(how, slice) and is_size(node.args[0]):  # type: ignore[arg-type]
        if any(isinstance(end, fx.Node) for end in (how.start, how.stop, how.step)):
            return None
        counts = {len(range(*how.indices(dimensions))) for dimensions in (8, 9)}
        return counts.pop() if len(counts) == 1 else None
    return len(how) if name in ("split", "split_with_sizes") and isinstance(how, tuple | list) else None


# What gives one tensor: leaves by the file of torch.nn that they are of; functions, operators and methods of tensors by name.
TENSOR_FILES = {
    "conv",
    "batchnorm",
    "normalization",
    "linear",
    "activation",
    "pooling",
    "dropout",
    "padding",
    "upsampling",
    "flatten",
}
ARITHMETIC = {"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "mean"}
TENSOR_CALLS = {
    *ARITHMETIC,
    "relu",
    "relu_",
    "silu",
    "gelu",
    "sigmoid",
    "softmax",
    "cat",
    "interpolate",
    "pad",
    "dropout",
    "flatten",
}
TENSOR_CALLS |= {"reshape", "view", "permute", "contiguous"}


def gives_tensor(leaf: nn.Module) -> bool:
    """Tell whether a module of PyTorch's own returns one tensor."""
    if isinstance(leaf, nn.MultiheadAttention) or getattr(leaf, "return_indices", False):
        return False
    return (
        is_batch_norm(leaf)
        or type(leaf) in CONVOLUTIONS
        or type(leaf).__module__ in {f"torch.nn.modules.{f}" for f in TENSOR_FILES}
    )
