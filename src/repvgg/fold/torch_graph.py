"""Read a module tree as a computation (flow.py): each module's own forward, with those of its children in their places."""

import operator
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import resembles_batch_norm, split_activation
from repvgg.fold.flow import Flow, Value
from repvgg.fold.guards import altered
from repvgg.fold.in_place import changed_by, changed_weights
from repvgg.fold.seen import Traces
from repvgg.fold.torch_memory import Memory, is_view, makes_new, may_change
from repvgg.fold.torch_operators import FUNCTIONS, Input, makes_flat, of_flat, of_module


@dataclass(eq=False)
class Place:
    """The place where a value is made: by the leaf at `path` ("" where by a function), in the forwards of the modules
    `owners`, outermost first; and the nodes it is known by, by the path of the module whose forward that is."""

    path: str | None
    owners: tuple[str, ...]
    nodes: dict[str, fx.Node] = field(default_factory=dict)


class ModuleFlow:
    """The computation of one module, seen from outside as a whole: its children's included, but for those in `apart`."""

    def __init__(self, model: nn.Module, traces: Traces, root: str) -> None:
        self.model, self.traces, self.root = model, traces, root
        self.names = {module: path for path, module in model.named_modules()}
        self.values: list[Value] = []
        self.places: dict[Value, Place] = {}
        self.apart: list[str] = []  # modules that are a computation of their own
        self.norms: dict[str, str] = {}  # batch norms that are no operator here, and why
        self.memory = Memory()
        self._flat: set[Value] = set()  # those that are known to be [N, C]
        (graph,) = traces.graphs[root]
        inputs = [self._enter(Value(n.name, says="the input"), None, (root,)) for n in graph.nodes if n.op == "placeholder"]
        returned = self._run(root, graph, inputs, (root,))
        outputs = set(_values_in(returned))
        self.memory.refuse_stale(self.values, {*inputs, *outputs})
        device = next(model.get_submodule(root).parameters(), torch.empty(0)).device
        self.flow = Flow(self.values, outputs, device)

    def owners(self, values: list[Value]) -> list[str]:
        """Return the modules whose forwards call all that makes these, outermost first."""
        owners = [self.places[v].owners for v in values if v in self.places] or [(self.root,)]
        return [paths[0] for paths in zip(*owners, strict=False) if len(set(paths)) == 1]

    # ------------------------------------------------------------------------------------------------------------- one forward

    def _run(self, path: str, graph: fx.Graph, inputs: list[Any], owners: tuple[str, ...]) -> Any:
        """Return what the forward of the module at `path` returns for these."""
        known: dict[fx.Node, Any] = {}
        waiting, changed = iter(inputs), changed_weights(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                known[node] = next(waiting)
            elif node.op == "get_attr" and node in changed:
                known[node] = self._enter(Value(node.name, says="a weight that is changed in place"), None, owners)
            elif node.op == "get_attr":
                known[node] = _attribute(self.model.get_submodule(path), str(node.target))
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: known[n])
            else:
                known[node] = self._call(path, node, known, owners)
            for v in _values_in(known[node]) if isinstance(known[node], Value) else ():
                self.places[v].nodes[path] = node
        return None

    def _call(self, path: str, node: fx.Node, known: dict[fx.Node, Any], owners: tuple[str, ...]) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: known[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: known[n])
        if node.op == "call_module":
            child = self.model.get_submodule(path).get_submodule(str(node.target))
            given = [*dict.fromkeys(_nodes_in((node.args, node.kwargs)))]
            return self._module(self.names[child], child, args, kwargs, [known[n] for n in given], owners)
        if node.target is operator.getitem and not isinstance(args[0], Value):
            with suppress(LookupError, TypeError):  # what a stranger's class returns there, a graph does not show
                return args[0][args[1]]
        inputs = list(dict.fromkeys(_values_in((args, kwargs))))
        changed = changed_by(node, args, kwargs)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        says, why, found = f"`{name}`", "", None
        if not inputs:
            constant = None if changed else _constant(node, args, kwargs)
            return self._enter(Value(node.name, says=says), None, owners) if constant is None else constant
        if (reader := FUNCTIONS.get(node.target)) is not None and not any(isinstance(c, Tensor) for c in changed):
            try:
                found = reader(*_numbered(args), **_numbered(kwargs))
                inputs = list(_values_in((args, kwargs)))
            except (ReparamError, TypeError) as error:
                why = f"{says} {error}"
        if isinstance(found, list):
            made = [self._enter(Value(f"{node.name}.{i}", tuple(inputs), how, says), None, owners) for i, how in enumerate(found)]
            for part in made:
                self.memory.share(part, inputs)
            return made
        v = self._enter(Value(node.name, tuple(inputs), found, says, why), None, owners)
        if makes_flat(name, *args[1:], **kwargs):
            self._flat.add(v)
        if is_view(name, args) or (found is not None and found.kind == "same"):
            self.memory.share(v, inputs)
        elif changed:
            self.memory.change(list(_values_in(changed)), v)
        return v

    def _module(self, path: str, module: nn.Module, args: Any, kwargs: Any, given: list[Any], owners: tuple[str, ...]) -> Any:
        cls = type(module).__name__
        inputs = list(dict.fromkeys(_values_in((args, kwargs))))
        says, why, found = f"{'an' if cls[:1] in 'AEIOU' else 'a'} {cls}", "", None
        graphs = self.traces.graphs.get(path, [])
        alone = self.traces.why_not_replaced(path)
        try:
            if len(args) == 1 and not kwargs and len(inputs) == 1:
                found = of_module(module, path) or (of_flat(module) if inputs[0] in self._flat else None)
            if found is not None and alone and found.kind != "same":
                found, why = None, f"its {cls} {alone}"
        except ReparamError as error:
            why = error.reason
        if found is None and not why and graphs:
            if len(graphs) == 1 and self.traces.uses[path] <= 1 and not altered(module) and not self._set_apart(path):
                return self._run(path, graphs[0], given, (*owners, path))
            self.apart.append(path)
        if found is None and resembles_batch_norm(module):
            self.norms[path] = why
        v = self._enter(Value(path, tuple(inputs), found, says, why), path, owners)
        if makes_flat(module) or (found is not None and inputs[0] in self._flat):
            self._flat.add(v)
        if found is None and may_change(self.traces, path, module):
            self.memory.change(inputs, v)
        elif found.kind == "same" if found is not None else not makes_new(module):
            self.memory.share(v, inputs)
        if found is not None and found.kind == "norm" and not isinstance(split_activation(module)[1], nn.Identity):
            return self._enter(Value(f"{path}.act", (v,), None, f"the activation of {says}"), None, owners)
        return v

    def _set_apart(self, path: str) -> bool:
        """Tell whether a forward has to stay: not all its uses can be seen, or it works under a context that would be lost."""
        return path in self.traces.hidden or path in self.traces.contexts

    def _enter(self, v: Value, path: str | None, owners: tuple[str, ...]) -> Value:
        self.values.append(v)
        self.places[v] = Place(path, owners)
        return v


def _values_in(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _values_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _values_in(value)
    elif isinstance(tree, slice):
        yield from _values_in((tree.start, tree.stop, tree.step))


def _nodes_in(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _numbered(tree: Any) -> Any:
    """The arguments of a call with an `Input` for each value."""
    if isinstance(tree, Value):
        return Input(0)
    if isinstance(tree, dict):
        return {key: _numbered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_numbered(value) for value in tree) if type(tree) in (list, tuple) else [_numbered(v) for v in tree]
    return tree


def _constant(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return what a call gives that no input goes into, if it gives the same each time: a function of parameters."""
    try:
        found, again = (_made(node, args, kwargs) for _ in range(2))
        pairs = zip(*(torch.utils._pytree.tree_leaves(made) for made in (found, again)), strict=True)
        return found if all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)) else None
    except Exception:  # whatever a stranger's code raises here, it is no constant for us
        return None


def _made(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0].clone(), str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs) if callable(node.target) else None


def _attribute(module: nn.Module, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module.detach() if isinstance(module, Tensor) else module
