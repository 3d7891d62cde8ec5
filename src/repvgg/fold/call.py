"""Describe how a module is called: its arguments, with a slot for each value that the caller computes; and how it leaves them."""

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
        """Return the call that passes only what has no default, or else the first argument alone."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        needed = sum(p.default is p.empty and p.kind in kinds for p in parameters)
        some = any(p.kind in (*kinds, inspect.Parameter.VAR_POSITIONAL) for p in parameters)
        return Call(tuple(Slot(i, tensor=True) for i in range(needed or some)), {})

    @staticmethod
    def by_example(inputs: tuple[Any, ...]) -> "Call":
        """Return the call that passes these, tensors of any value in the place of theirs."""
        number = count()
        fill: Any = lambda v: Slot(next(number), tensor=True) if isinstance(v, Tensor) else v  # noqa: E731
        return Call(torch.utils._pytree.tree_map(fill, inputs), {})

    @property
    def key(self) -> tuple[str, tuple[bool, ...]]:
        """Return what tells this call from others: its arguments, and which of its slots hold tensors."""
        tensors = list[bool]()
        torch.utils._pytree.tree_map(lambda v: tensors.append(v.tensor) if isinstance(v, Slot) else None, (self.args, self.kwargs))
        return repr(self), tuple(tensors)

    def leaves_open(self, module: nn.Module) -> str:
        """Return the names of what another call of this module may pass: what this one does not, or passes as a fixed value."""
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        pairs = zip_longest(inspect.signature(module.forward).parameters.values(), self.args)
        open_ = [p.name for p, given in pairs if p is not None and (p.kind in several or not isinstance(given, Slot))]
        return ", ".join(f"`{name}`" for name in open_)


ONE_INPUT = Call((Slot(0),), {})


class Gone:
    """Stand for what a list holds after a module has changed it. A forward that looks at it cannot be traced."""


def left_in(given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Return the length of each list, and the keys of each dictionary, among these arguments; None where one is inside another."""
    values = [*given[0], *given[1].values()]
    inner = [v for value in values if type(value) in (list, dict) for v in (value.values() if type(value) is dict else value)]
    if any(type(v) in (list, dict, tuple) for v in inner) or any(type(v) is tuple for v in values):
        return None
    return tuple(len(v) if type(v) is list else tuple(v) if type(v) is dict else None for v in values)


def leave(given: tuple[tuple[Any, ...], dict[str, Any]], left: Any) -> None:
    """Change the lists among these arguments to as many values as `left_in` found, which nothing may look at."""
    for value, how in zip([*given[0], *given[1].values()], left, strict=True):
        if type(value) is list:
            value[:] = [Gone()] * how
        elif type(value) is dict:
            value.clear()
            value.update(dict.fromkeys(how, Gone()))


def lasting(root: nn.Module) -> set[int]:
    """Return which lists and dictionaries modules, their classes and their files hold."""
    modules = set(root.modules())
    holders = [*map(vars, modules), *(vars(cls) for m in modules for cls in type(m).__mro__)]
    holders += [getattr(m.forward, "__globals__", {}) for m in modules]
    return {id(value) for holder in holders for value in list(holder.values()) if type(value) in (list, dict)}


def contents(value: Any) -> Any:
    """Return what is in a list, dictionary or set, and in those inside it, in a form that tells whether it has changed."""
    if isinstance(value, dict):
        return [(key, contents(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [type(value), *map(contents, value)]
    return sorted(map(id, value)) if isinstance(value, set) else id(value)


def own_lists(module: nn.Module) -> list[tuple[str, Any, Any, Any]]:
    """Return the lists, dictionaries and sets that a module, its class and its file hold: name, value, a copy, and contents."""
    holders = [vars(module), *map(vars, type(module).__mro__), getattr(module.forward, "__globals__", {})]
    named = [(n, v) for holder in holders for n, v in holder.items() if type(v) in (list, dict, set)]
    return [(n, v, v.copy(), contents(v)) for n, v in named if not n.startswith("__") and n not in EVERYWHERE]


def restored(lists: list[tuple[str, Any, Any, Any]]) -> dict[str, Any]:
    """Put back what was in lists that `own_lists` returned; return, by name, those that were changed, as they were left."""
    changed = {}
    for name, value, copy, before in lists:
        if contents(value) != before:
            changed[name] = value.copy()
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
    return changed


EVERYWHERE = {*vars(nn.Module()), *vars(nn.Module)}  # what every module has
