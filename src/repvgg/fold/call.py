"""Describe how a module is called: its arguments, with a slot for each value that the caller computes."""

import inspect
from dataclasses import dataclass, field
from itertools import count, zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

TENSOR = "repvgg.tensor"  # in a node's meta


@dataclass(frozen=True)
class Slot:
    """Stand for a value that the caller passes: the same number, the same value."""

    number: int
    tensor: bool = field(default=False, compare=False, repr=False)  # what a user passes to a network is one


@dataclass(frozen=True)
class Call:
    """Hold the arguments of a call, with slots in place of values that the caller computes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(node: fx.Node) -> "Call":
        slots: dict[fx.Node, Slot] = {}
        fill: Any = lambda n: slots.setdefault(n, Slot(len(slots), n.meta.get(TENSOR, False)))  # noqa: E731
        return Call(fx.node.map_arg(node.args, fill), fx.node.map_arg(node.kwargs, fill))

    @staticmethod
    def by_default(module: nn.Module) -> "Call":
        """Return the call that passes only what has no default."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        needed = sum(p.default is p.empty and p.kind in kinds for p in parameters)
        many = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        return Call(tuple(Slot(i, tensor=True) for i in range(needed or many)), {})

    @staticmethod
    def by_example(inputs: tuple[Any, ...]) -> "Call":
        """Return the call that passes these, tensors of any value in the place of theirs."""
        number = count()
        fill: Any = lambda v: Slot(next(number), tensor=True) if isinstance(v, Tensor) else v  # noqa: E731
        return Call(torch.utils._pytree.tree_map(fill, inputs), {})

    def leaves_open(self, module: nn.Module) -> str:
        """Return the names of what another call of this module may pass: what this one does not, or passes as a fixed value."""
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        pairs = zip_longest(inspect.signature(module.forward).parameters.values(), self.args)
        open_ = [p.name for p, given in pairs if p is not None and (p.kind in several or not isinstance(given, Slot))]
        return ", ".join(f"`{name}`" for name in open_)


ONE_INPUT = Call((Slot(0),), {})
