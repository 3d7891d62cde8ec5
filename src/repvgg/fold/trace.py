"""See how a network uses its modules: each one's own forward, traced as its parent calls it, with its children as leaves.

    traces = trace(model)
    traces.graphs["layer1.0"]       # the forward of that module as `fx.Graph`s, one for each way in which it is called
    traces.hidden.get(path)         # why not every use of the module at `path` can be seen, if so

Tracing goes from the top down, because a forward may do something else when it is called with other arguments than its defaults.
"""

import gc
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.guards import copied, parts


@dataclass
class Traces:
    """What the forwards of a network show. A module's path is the first one under which `named_modules` lists it.

    graphs: by module, its forward with its children as leaves, once for each way in which it is called. The targets of call_module
        and get_attr nodes are relative to that module. A value that the forward keeps somewhere besides returning it
        (`self.raw = y`) has one user more, a call of `kept`.
    uses: by module, how many places call it or use a tensor of it, or how many hold it, whichever is more.
    exposed: modules that are used in another way than by calling them with one input, with the reason: their attributes, a part
        of them, more arguments.
    hidden: modules of which not every use can be seen, with the reason. So a part of them must not be changed.
    untraceable: modules whose forward cannot be traced, with what went wrong. All that they hold is hidden.
    """

    graphs: dict[str, list[fx.Graph]] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    exposed: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)

    def below(self, paths: Collection[str]) -> set[str]:
        """The traced modules that lie at or below one of these paths."""
        return {p for p in self.graphs if any(p == path or p.startswith(f"{path}.") or not path for path in paths)}

    def why_not_replaced(self, path: str) -> str | None:
        """Why something that computes what follows it too must not take this module's place, if so."""
        if self.uses[path] > 1:
            return "is used in more than one place"
        if reason := self.exposed.get(path) or self.hidden.get(path):
            return f"may be used in ways that cannot be seen: {reason}"
        return None


def trace(model: nn.Module) -> Traces:
    """Trace a copy of `model` (a forward may store what it sees), from the top down; the whole as it is called with one input."""
    return _Walk(copied(model, share_tensors=True)).traces


def refuse_lost(model: nn.Module, before: Traces, done: str) -> None:
    """Raise `ReparamError` naming a module whose forward could be traced before, and now, its parts `done`, cannot."""
    if broken := trace(model).untraceable.keys() - before.untraceable.keys():
        raise ReparamError(f"uses a {done} module in another way than calling its own child of that name", min(broken))


def kept(value: Any) -> Any:
    """Stand in a graph for a place, unknown to the graph, that holds `value` after the forward is done."""
    return value


# ---------------------------------------------------------------------------------------------- from the top down


@dataclass(frozen=True)
class _Slot:
    """A value that the caller passes: the same number, the same value."""

    number: int


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, with slots in place of values that the caller computes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(node: fx.Node) -> "_Call":
        slots: dict[fx.Node, _Slot] = {}
        fill: Any = lambda n: slots.setdefault(n, _Slot(len(slots)))  # noqa: E731
        return _Call(fx.node.map_arg(node.args, fill), fx.node.map_arg(node.kwargs, fill))

    @staticmethod
    def by_default(module: nn.Module) -> "_Call":
        """The call that passes what has no default."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = inspect.signature(module.forward).parameters.values()
        return _Call(tuple(_Slot(i) for i, p in enumerate(parameters) if p.default is p.empty and p.kind in kinds), {})


ONE_INPUT = _Call((_Slot(0),), {})


class _Walk:
    """The modules of one network, each traced once for each way in which it is called."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: path for path, module in model.named_modules()}
        self.traces = Traces()
        self.counted: dict[str, Counter[str]] = {}  # by the module whose forward it is
        self.written: dict[nn.Module, set[str]] = {}
        self.read: list[tuple[nn.Module, nn.Module, str]] = []  # who reads, of whom, what
        self.todo = [(m, _Call.by_default(m)) for m in _entries(model)]
        done: set[tuple[nn.Module, str]] = set()
        while self.todo:
            module, call = self.todo.pop()
            if (module, repr(call)) not in done and not _is_operator(module):
                done.add((module, repr(call)))
                self._visit(module, call)
        self._distrust_readers_of_what_is_written()
        self._hide({module for module, _ in done})
        for counted in self.counted.values():
            self.traces.uses += counted
        self.traces.uses |= Counter(self.names[child] for parent in self.names for _, child in parts(parent))

    def _visit(self, module: nn.Module, call: _Call) -> None:
        path = self.names[module]
        seen, graph = _Seen(), None
        try:
            graph = _traced(module, call, seen)
        except Exception as error:  # whatever a stranger's forward may raise on a value that is not there
            self.traces.untraceable[path] = _first_line(error)
        for other, name in seen.reads:
            self.read.append((module, other, name))
            self.traces.exposed.setdefault(self.names[other], f"{_called(path, module)} uses its `{name}`")
        for other, name in seen.writes:
            self.written.setdefault(other, set()).add(name)
            if other is not module:
                why = f"{_called(path, module)} sets its `{name}` while it runs"
                for inner in other.modules():
                    self.traces.exposed.setdefault(self.names[inner], why)
        if graph is None:
            return
        counted: Counter[str] = Counter()
        for node in graph.nodes:
            owner = _owner(node)
            if owner is not None:
                used = module.get_submodule(owner)
                counted[self.names[used]] += 1
                inside = owner.split(".")
                self._expose(path, module, inside if node.op == "get_attr" else inside[:-1])
            if node.op == "call_module":
                call = _Call.of(node)
                self.todo.append((used, call))
                if call != ONE_INPUT:
                    self.traces.exposed.setdefault(self.names[used], f"{_called(path, module)} calls it with more than its input")
                    self.read.append((module, used, ARGUMENTS))
        self.counted[path] = self.counted.get(path, Counter()) | counted
        self.traces.graphs.setdefault(path, []).append(graph)

    def _expose(self, path: str, module: nn.Module, owners: list[str]) -> None:
        """What lies between a module and what its forward uses is not called as a whole."""
        for i in range(len(owners)):
            between = module.get_submodule(".".join(owners[: i + 1]))
            self.traces.exposed.setdefault(self.names[between], f"{_called(path, module)} uses a part of it")

    def _distrust_readers_of_what_is_written(self) -> None:
        """A forward that reads what another one writes may do something else than its trace shows."""
        for reader, owner, name in self.read:
            if name in self.written.get(owner, ()):
                why = f"it reads `{name}`, which {_called(self.names[owner], owner)} sets while it runs"
                self.traces.untraceable.setdefault(self.names[reader], why)

    def _hide(self, reached: set[nn.Module]) -> None:
        modules = {path: module for module, path in self.names.items()}
        for path, why in self.traces.untraceable.items():
            self.traces.graphs.pop(path, None)
            for inner in set(modules[path].modules()) - {modules[path]}:
                self.traces.hidden.setdefault(self.names[inner], f"{_called(path, modules[path])} cannot be traced ({why})")
        called = {path for counted in self.counted.values() for path in counted}
        for module, path in self.names.items():
            if module not in reached and path not in called and not _has_no_forward(module):
                self.traces.hidden.setdefault(path, "nothing that is traced calls it")


def _entries(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a user calls: the model, or if it is a ModuleList or a ModuleDict, those that it holds."""
    if not _has_no_forward(model):
        yield model
    else:
        for _, child in parts(model):
            yield from _entries(child)


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _is_operator(module: nn.Module) -> bool:
    """It is one of PyTorch's own, with nothing inside: its type says all."""
    return not parts(module) and type(module).__module__.startswith("torch.nn.")


def _owner(node: fx.Node) -> str | None:
    """The module below the traced one that a node calls, or takes a tensor of."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rpartition(".")[0] or None if node.op == "get_attr" else None


def _called(path: str, module: nn.Module) -> str:
    return path or type(module).__name__


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:80] or type(error).__name__


# ---------------------------------------------------------------------------------------------------- one forward


@dataclass
class _Seen:
    """Attributes of modules that a forward read (of others) or wrote (of any)."""

    reads: list[tuple[nn.Module, str]] = field(default_factory=list)
    writes: list[tuple[nn.Module, str]] = field(default_factory=list)


def _traced(module: nn.Module, call: _Call, seen: _Seen) -> fx.Graph:
    """The forward of `module` as it is called. What it reads and writes goes into `seen`; what it wrote is put back as it was."""
    tracer = _Tracer(call, seen)
    try:
        graph = tracer.trace(module)
        if tracer.undo:  # it has a state: does it do the same the next time?
            again = _Tracer(call, seen)
            try:
                if str(again.trace(module)) != str(graph):
                    raise ValueError("it does something else each time")
            finally:
                again.restore()
    finally:
        tracer.restore()
    if repr(tracer.given) != tracer.as_given:
        seen.writes.append((module, ARGUMENTS))
    tracer.given = None
    tracer.mark_kept(graph)
    return graph


ARGUMENTS = "a list or dictionary that it is given"
MACHINERY = {*dir(nn.Module), *vars(nn.Module())}  # what every module has says nothing about what one does


class _Tracer(fx.Tracer):
    """Trace one module's own forward for one call; every module that it calls is a leaf."""

    def __init__(self, call: _Call, seen: _Seen) -> None:
        super().__init__()
        self.call, self.seen = call, seen
        self.given: Any = None  # the arguments, and how they looked before the forward
        self.as_given = ""
        self.undo: list[tuple[dict[str, Any], str, Any]] = []
        self.watching = False
        self.alive: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies: dict[int, fx.Proxy] = {}

        def filled(value: Any) -> Any:
            if isinstance(value, _Slot):
                if value.number not in proxies:
                    proxies[value.number] = self.create_proxy("placeholder", f"input_{value.number}", (), {})
                return proxies[value.number]
            if isinstance(value, slice):
                return slice(filled(value.start), filled(value.stop), filled(value.step))
            if isinstance(value, tuple | list):
                return type(value)(filled(v) for v in value)
            return {key: filled(v) for key, v in value.items()} if isinstance(value, dict) else value

        args, kwargs = filled(tuple(self.call.args)), filled(dict(self.call.kwargs))
        self.given, self.as_given = (args, kwargs), repr((args, kwargs))

        def forward(*args: Any) -> Any:
            with self._watch():
                return root_fn(*args, **kwargs)

        return forward, [self.root, *args]

    # ------------------------------------------------------------ what the forward does to modules, not to values

    @contextmanager
    def _watch(self) -> Iterator[None]:
        plain_get, plain_set = nn.Module.__getattribute__, nn.Module.__setattr__

        def get(module: nn.Module, name: str) -> Any:
            value = plain_get(module, name)
            if self.watching and module is not self.root and name not in MACHINERY:
                self.seen.reads.append((module, name))
                if isinstance(value, list | dict | set):  # which may be changed as well as read
                    self.seen.writes.append((module, name))
            return value

        def set_(module: nn.Module, name: str, value: Any) -> None:
            if self.watching:
                self.seen.writes.append((module, name))
                home = next((d for d in (module._buffers, module._parameters, module._modules) if name in d), vars(module))
                self.undo.append((home, name, home.get(name, _MISSING)))
            self._quietly(lambda: plain_set(module, name, value))

        nn.Module.__getattribute__, nn.Module.__setattr__ = get, set_  # type: ignore[method-assign, assignment]
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            del nn.Module.__getattribute__
            nn.Module.__setattr__ = plain_set  # type: ignore[method-assign]

    def restore(self) -> None:
        """Put the attributes that the forward wrote back as they were."""
        for home, name, value in reversed(self.undo):
            if value is _MISSING:
                home.pop(name, None)
            else:
                home[name] = value

    def _quietly(self, do: Callable[[], Any]) -> Any:
        """The tracer's own look at modules is no use of them."""
        watching, self.watching = self.watching, False
        try:
            return do()
        finally:
            self.watching = watching

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return self._quietly(lambda: super(_Tracer, self).getattr(attr, attr_val, parameter_proxy_cache))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._quietly(lambda: super(_Tracer, self).call_module(m, forward, args, kwargs))

    def create_arg(self, a: Any) -> Any:
        return self._quietly(lambda: super(_Tracer, self).create_arg(a))

    # ---------------------------------------------------------------------------- values that outlive the forward

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Value(node, self)
        self.alive.append((node, weakref.ref(made)))
        return made

    def mark_kept(self, graph: fx.Graph) -> None:
        """Whatever still holds a value now that the forward is done is one more user of it."""
        computed = [(node, ref) for node, ref in self.alive if node.op not in ("get_attr", "placeholder")]
        for generation in (1, 2):  # what nobody holds may still await the garbage collector; all of it is rarely needed
            if any(ref() is not None for _, ref in computed):
                gc.collect(generation)
        output = next(node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(output):
            for node, ref in computed:
                if ref() is not None:
                    graph.call_function(kept, (node,))


class _Value(fx.Proxy):
    """A value in a trace. Nobody can say what type it has, so a forward that asks (`isinstance`) cannot be traced."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override, misc]
        if self.tracer.watching:  # type: ignore[attr-defined]
            raise TypeError("it asks what type a value is")
        return _Value


_MISSING = object()
