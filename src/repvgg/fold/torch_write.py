"""Write linear stretches back into a module tree as convolutions.

A chain of modules (a convolution and its batch norm) becomes a convolution and identities in their places, so that every forward
stays as its author wrote it. Where branches meet in a forward, that forward is written anew, without them.
"""

import inspect
from typing import Any

from torch import fx, nn

from repvgg.fold.as_linear import as_conv, main_tensor, split_activation
from repvgg.fold.flow import Stretch, Value
from repvgg.fold.guards import altered, inside
from repvgg.fold.seen import kept
from repvgg.fold.torch_graph import ModuleFlow
from repvgg.fold.torch_memory import MUTATED
from repvgg.fold.torch_operators import FLAT


class Rewritten(fx.GraphModule):
    """A module whose forward was written anew. What else it held (numbers, strings) it still holds."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copy = super().__deepcopy__(memo)
        keep_plain(self, copy)
        return copy


def keep_plain(module: nn.Module, to: nn.Module) -> None:
    """Give `to` the mode and those attributes of `module` that are no tensors, modules or code."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(to) and isinstance(value, (int, float, str, tuple, type(None))):
            setattr(to, name, value)
    to.train(module.training)  # what holds the modules there as well, which fx makes


class ModuleWriter:
    """Puts stretches of one `ModuleFlow` into its model."""

    def __init__(self, model: nn.Module, read: ModuleFlow) -> None:
        self.model, self.read = model, read
        self.rewritten: dict[str, fx.Graph] = {}  # by path
        self.written: set[Value] = set()

    def refuse(self, stretch: Stretch) -> str | None:
        """Return why it cannot be written, if so."""
        if self.read.memory.moves_past_a_change(stretch, self.read.values):
            return MUTATED
        traces, chain = self.read.traces, self._chain(stretch)
        names = traces.open.get(self.read.owners(stretch.inside)[-1])
        if names and traces.call is None:
            return f"the forward that it lies in may do something else, given {names}: pass an example of how it is called"
        if names and not chain:
            return f"writing the forward that it lies in anew would take {names} away"
        if chain:
            return None
        if any(self._is_flat(v) for v in stretch.inside):
            return "its linear layers are no chain"
        if self._home(stretch) is not None:
            return None
        if context := traces.contexts.get(self.read.owners(stretch.inside)[-1]):
            return f"the forward that it lies in works under {context}: written anew it would lose that, or do it twice"
        return "its parts lie in forwards that do not see both its ends"

    def _is_flat(self, v: Value) -> bool:
        path = self._path(v)
        return path is not None and type(self.model.get_submodule(path)) in FLAT

    def write(self, stretch: Stretch) -> str:
        """Returns the path of the convolution that takes its place."""
        chain = self._chain(stretch)
        self.written.update(stretch.inside)
        return self._write_chain(stretch, chain) if chain else self._write_forward(stretch)

    def name_of(self, v: Value) -> str:
        """Return what the report calls an operator: the path of its module, or a function's name in the forward that calls it."""
        path = self._path(v)
        owner = self.read.places[v].owners[-1] if v in self.read.places else ""
        return path if path is not None else f"{owner}.{v.name}" if owner else v.name

    # ---------------------------------------------------------------------------------------------------------------- chains

    def _chain(self, stretch: Stretch) -> list[str] | None:
        """The paths of its modules, where it is a chain of modules."""
        paths = []
        for v in stretch.inside:
            path = self._path(v)
            if len(v.inputs) != 1 or (path is None and _operator(v) != "same"):
                return None
            if path is not None and _operator(v) != "same":
                paths.append(path)
        between = [v.inputs[0] for v in stretch.inside]  # each reads the one before
        return paths if between == [stretch.source, *stretch.inside[:-1]] else None

    def _path(self, v: Value) -> str | None:
        """Return the name of the module that makes a value; a part of a batch norm has that batch norm's."""
        place = self.read.places.get(v)
        if place is None:
            whole = next(w for w in self.read.flow.values if v in w.inputs)
            place = self.read.places[whole]
        return place.path

    def _write_chain(self, stretch: Stretch, paths: list[str]) -> str:
        convs = [p for v in stretch.inside if _operator(v) == "convolution" and (p := self._path(v)) is not None]
        keeps = max(convs, key=lambda path: main_tensor(self.model.get_submodule(path)).numel())
        norms = {self._path(v) for v in stretch.inside if v.is_norm}
        fallen = {self._path(norm) for norm in self.read.flow.fallen}
        for path in paths:
            if path != keeps and path not in fallen:
                after = split_activation(self.model.get_submodule(path))[1] if path in norms else nn.Identity().eval()
                self.model.set_submodule(path, after)
        kept = self.model.get_submodule(keeps)
        with inside(keeps):
            conv = as_conv(stretch.map, like=main_tensor(kept))
        self.model.set_submodule(keeps, _as_layer(conv) if isinstance(kept, nn.Linear) else conv)
        return keeps

    # -------------------------------------------------------------------------------------------------------------- forwards

    def _home(self, stretch: Stretch) -> str | None:
        """The innermost module whose forward sees both ends of a stretch and calls all that is inside."""
        source, target = (self.read.places.get(v) for v in (stretch.source, stretch.target))
        if source is None or target is None:
            return None
        for path in reversed(self.read.owners(stretch.inside)):
            if not self._may_rewrite(path) or self._breaks_apart(stretch, path):
                return None
            if path in source.nodes and path in target.nodes:
                return str(path)
        return None

    def _breaks_apart(self, stretch: Stretch, home: str) -> bool:
        """Tell whether a module that `home` calls holds a part of a stretch and something else besides, which would be lost."""
        below = {place.owners[: place.owners.index(home) + 2] for place in map(self.read.places.get, stretch.inside) if place}
        gone = {owners for owners in below if owners[-1] != home}
        return any(
            v not in stretch.inside and any(place.owners[: len(o)] == o for o in gone) for v, place in self.read.places.items()
        )

    def _may_rewrite(self, path: str) -> bool:
        """Nobody else looks into it, and its forward does nothing besides computing."""
        traces = self.read.traces
        known = any(path in seen for seen in (traces.exposed, traces.hidden, traces.open, traces.contexts))
        known = known or altered(self.model.get_submodule(path)) is not None
        return not known and all(node.target is not kept for node in traces.graphs[path][0].nodes)

    def _write_forward(self, stretch: Stretch) -> str:
        home = self._home(stretch)
        assert home is not None
        module = self.model.get_submodule(home)
        graph = self.rewritten.setdefault(home, self.read.traces.graphs[home][0])
        source, target = (self.read.places[v].nodes[home] for v in (stretch.source, stretch.target))
        name, like = self._name(stretch, home, graph)
        with inside(f"{home}.{name}" if home else name):
            conv = as_conv(stretch.map, like)
        with graph.inserting_before(target):
            node = graph.call_module(name, (source,))
        target.replace_all_uses_with(node)
        self.read.places[stretch.target].nodes[home] = node
        if "." in name or name in module._modules:
            module.set_submodule(name, conv)
        else:
            module.add_module(name, conv)
        old = {n for v in stretch.inside if v in self.read.places for n in self.read.places[v].nodes.values()}
        _erase_dead(graph, old | {target})
        return f"{home}.{name}" if home else name

    def _name(self, stretch: Stretch, home: str, graph: fx.Graph) -> tuple[str, Any]:
        """Return the name of the child which held most of it, where nothing else of that child is left; and its tensor."""
        best: tuple[int, str, Any] = (0, "", None)
        for v in stretch.inside:
            place = self.read.places.get(v)
            if place is None or place.path is None or _operator(v) != "convolution":
                continue
            like = main_tensor(self.model.get_submodule(place.path))
            inner = place.path[len(home) + 1 if home else 0 :]
            calls = [n for n in graph.nodes if n.op == "call_module" and (inner + ".").startswith(f"{n.target}.")]
            name = str(calls[0].target) if calls else ""
            if like.numel() > best[0]:
                best = like.numel(), name, like
        if best[1]:
            return best[1], best[2]
        taken = {str(n.target) for n in graph.nodes}
        name = next(n for i in range(1000) if (n := f"folded_{i}" if i else "folded") not in taken)
        return name, best[2] if best[2] is not None else main_tensor(self.model.get_submodule(home))

    def finish(self) -> nn.Module:
        """Return the model with its rewritten forwards, the innermost first; batch norms that fell apart become identities."""
        for norm in self.read.flow.fallen:
            if (path := self._path(norm)) is not None and self.written.issuperset(norm.inputs):
                self.model.set_submodule(path, split_activation(self.model.get_submodule(path))[1])
        model = self.model
        for path in sorted(self.rewritten, key=lambda p: -p.count(".") if p else 1):
            module, graph = model.get_submodule(path), self.rewritten[path]
            new = _only_convolution(module, graph)
            if new is None:
                graph._tracer_cls = None  # a copy, or what a pickle becomes, is traced by the plain one
                _name_inputs(graph, module)
                new = Rewritten(module, graph, type(module).__name__)
                keep_plain(module, new)
            for parent in model.modules():  # it may be held in more than one place
                for name, child in parent._modules.items():
                    if child is module:
                        parent._modules[name] = new
            model = model if path else new
        return model


def _as_layer(conv: nn.Conv2d) -> nn.Linear:
    """Return a 1x1 convolution as what it is on [N, C]."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, conv.in_channels, conv.out_channels)
    layer.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=conv.weight.requires_grad)
    layer.bias = conv.bias  # type: ignore[assignment]
    return layer.eval()


def _name_inputs(graph: fx.Graph, module: nn.Module) -> None:
    """Call the inputs of a rewritten forward as its author did."""
    names = list(inspect.signature(module.forward).parameters)
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], names, strict=False):
        node.target = node.name = name


def _operator(v: Value) -> str:
    assert v.operator is not None
    return v.operator.kind


def _erase_dead(graph: fx.Graph, inside: set[fx.Node]) -> None:
    """Take out the nodes of a stretch that nothing reads any more, and what only they read."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and (node in inside or node.op == "get_attr"):
            inside.update(n for n in node.all_input_nodes if n.op in ("call_function", "call_method"))
            graph.erase_node(node)


def _only_convolution(module: nn.Module, graph: fx.Graph) -> nn.Module | None:
    """The convolution that a forward does nothing else than call."""
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    output = next(n for n in graph.nodes if n.op == "output")
    if len(calls) != 1 or calls[0].op != "call_module" or output.args[0] is not calls[0]:
        return None
    found = module.get_submodule(str(calls[0].target))
    return found if isinstance(found, nn.Conv2d) else None
