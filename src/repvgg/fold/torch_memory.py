"""Follow which values of a computation may lie in the same memory, and what changes in place forbid a fold.

A trace knows values by their names. After `y = x.mul_(2)` the name `x` holds what `y` does: who reads it then reads something else
than the trace says, and the change must stay.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from repvgg.fold.flow import Stretch, Value
from repvgg.fold.guards import altered
from repvgg.fold.in_place import changed_by
from repvgg.fold.seen import Traces

MUTATED = "what it reads is changed in place"
# What may give back the memory of its input: a change in place of the one is one of the other.
VIEWS = {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "to", "split", "chunk", "unbind", "squeeze",
         "unsqueeze", "expand", "detach", "getitem", "float", "narrow", "identity", "double", "half", "type", "type_as", "view_as",
         "reshape_as", "expand_as", "select", "movedim", "moveaxis", "swapaxes", "swapdims", "unflatten", "ravel", "diagonal",
         "tensor_split", "split_with_sizes", "t", "unfold", "data", "T", "mT", "dropout", "dropout1d", "dropout2d", "dropout3d",
         "alpha_dropout", "feature_dropout"}  # fmt: skip
NEW = {f"torch.nn.modules.{f}" for f in ("conv", "batchnorm", "normalization", "activation", "pooling", "upsampling", "padding")}


class Memory:
    """The memory of the values of one computation."""

    def __init__(self) -> None:
        self._lines: dict[Value, frozenset[Value]] = {}  # each with all that it is a view or a changed form of
        self._changes: dict[Value, list[Value]] = {}  # by what the memory was first: what changes it in place

    def share(self, v: Value, of: Collection[Value]) -> None:
        """Note that `v` may lie in the memory of these."""
        self._lines[v] = self._line(v).union(*map(self._line, of))

    def change(self, values: Collection[Value], by: Value) -> None:
        """Note that what makes `by` may change these in place, and give them back."""
        self.share(by, values)
        for first in {w for v in values for w in self._line(v) if len(self._line(w)) == 1}:
            self._changes.setdefault(first, []).append(by)

    def _line(self, v: Value) -> frozenset[Value]:
        return self._lines.get(v, frozenset((v,)))

    def _later(self, v: Value) -> Iterator[Value]:
        """Yield what may change the memory of `v` besides what made it."""
        line = self._line(v)
        yield from (by for w in line for by in self._changes.get(w, ()) if by not in line)

    def refuse_stale(self, values: list[Value], outside: Collection[Value]) -> None:
        """Take the operator from what reads a value that has been changed since, and from what changes what others read.

        outside: the values that are read from outside, or come from there.
        """
        if not self._changes:
            return
        order = {v: n for n, v in enumerate(values)}
        refused = {by for v in outside for by in self._later(v)}
        for v in values:
            for by in (by for source in v.inputs for by in self._later(source)):
                if order[by] < order[v]:
                    refused |= {v, by}
        for v in refused:
            if v.operator is not None:
                v.operator, v.why = None, MUTATED

    def moves_past_a_change(self, stretch: Stretch, values: list[Value]) -> bool:
        """Tell whether a stretch, which reads its source where its target is made, would read it after a change."""
        changes = [by for by in self._later(stretch.source) if by not in stretch.inside]
        order = {v: n for n, v in enumerate(values)} if changes else {}
        return any(order[stretch.source] < order[by] <= order[stretch.target] for by in changes)


def is_view(name: str, args: tuple[Any, ...]) -> bool:
    """Tell whether a function, a method or an attribute may give back the memory of its input."""
    return name in VIEWS or (name == "getattr" and args[1] in VIEWS)


def makes_new(module: nn.Module) -> bool:
    """Tell whether a module surely gives memory of its own, if it does not work in place."""
    return not altered(module) and (type(module) is nn.Linear or type(module).__module__ in NEW)


def may_change(traces: Traces, path: str, module: nn.Module) -> bool:
    """Tell whether a module that is called as a whole may change its input in place; nobody knows what one that hides does."""
    if any(getattr(m, "inplace", False) for m in module.modules()):
        return True
    inner = [f"{path}.{name}".strip(".") for name, _ in module.named_modules()]
    nodes = (node for p in inner for graph in traces.graphs.get(p, ()) for node in graph.nodes if node.op.startswith("call_"))
    return any(p in traces.untraceable for p in inner) or any(
        node.op != "call_module" and changed_by(node, node.args, node.kwargs) for node in nodes
    )
