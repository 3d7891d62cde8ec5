"""Tell what the nodes of a trace change in place."""

import inspect
import operator
from typing import Any

from torch import fx

from repvgg.fold.values import IN_PLACE


def changed_by(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what a call of a function or a method changes in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or node.target in (*IN_PLACE.values(), operator.setitem) or _says_in_place(node.target, args, kwargs):
        return [args[0] if args else kwargs.get("input"), kwargs.get("out")]
    return [kwargs["out"]] if "out" in kwargs else []


def changed_weights(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of those tensors of modules that a forward changes in place, or a view or a form of them."""
    made_of: dict[fx.Node, set[fx.Node]] = {}  # what no input goes into, and of which tensors it is made
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            made_of[node] = {node}
        elif node.op in ("call_function", "call_method"):
            if node.all_input_nodes and all(n in made_of for n in node.all_input_nodes):
                made_of[node] = set().union(*(made_of[n] for n in node.all_input_nodes))
            for n in changed_by(node, node.args, node.kwargs):
                changed |= made_of.get(n, set()) if isinstance(n, fx.Node) else set()
    return {node for node in made_of if node.op == "get_attr" and node.target in {n.target for n in changed}}


def _says_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "inplace" in kwargs or not any(value is True for value in args) or not callable(function):
        return bool(kwargs.get("inplace"))
    try:
        return bool(inspect.signature(function).bind(*args, **kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return False
