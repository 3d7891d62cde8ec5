"""See how a network uses its modules: each one's own forward, traced as its parent calls it, with its children as leaves.

    traces = trace(model)
    traces.graphs["layer1.0"]       # the forward of that module as `fx.Graph`s, one for each way that it may go
    traces.hidden.get(path)         # why not every use of the module at `path` can be seen, if so

Tracing goes from the top down, because a forward may do something else when it is called with other arguments than its defaults.
"""

import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import as_linear, is_batch_norm
from repvgg.fold.call import ONE_INPUT, TENSOR, Call, Slot
from repvgg.fold.guards import called_as_torch_does, copied, parts
from repvgg.fold.in_place import changed_weights
from repvgg.fold.seen import Assumed, Seen, Traces
from repvgg.fold.tracer import ARGUMENTS, watched_modules
from repvgg.fold.values import TENSOR_CALLS, VALUE, AsksPartsError, AsksTypeError, gives_tensor
from repvgg.fold.ways import ways


def trace(model: nn.Module, call: Call | None = None) -> Traces:
    """Trace a copy of `model` (a forward may store what it sees), from the top down; the whole as `call` does, or else with what
    it requires."""
    with _alone:
        return _Walk(copied(model, share_tensors=True), call).traces


def refuse_lost(model: nn.Module, before: Traces, done: str) -> None:
    """Raise `ReparamError` naming a module whose forward could be traced before, and now, its parts `done`, cannot."""
    if broken := trace(model, before.call).untraceable.keys() & before.graphs.keys():
        how = "in another way than calling its own child of that name (is it in a plain list? an nn.ModuleList is followed)"
        raise ReparamError(f"uses a {done} module {how}", min(broken) or type(model).__name__)


_alone = threading.RLock()  # tracing changes `nn.Module` for as long as it lasts, and fx some functions


class _Walk:
    """Trace the modules of one network, each once for each way in which it is called."""

    def __init__(self, model: nn.Module, call: Call | None) -> None:
        self.names = {module: path for path, module in model.named_modules()}
        self.traces = Traces(call=call)
        self.counted: dict[str, Counter[str]] = {}  # by the module whose forward it is
        self.written: dict[nn.Module, set[str]] = {}
        self.read: list[tuple[nn.Module, nn.Module, str]] = []  # who reads, of whom, what
        self.calls: dict[nn.Module, list[tuple[Call, list[fx.Graph]]]] = {}
        self.known: dict[Any, tuple[list[fx.Graph] | Exception, Seen]] = {}
        self.todo = [(m, call or Call.by_default(m)) for m in _entries(model)]
        self.traces.open = {self.names[m]: names for m, call in self.todo if (names := call.leaves_open(m))}
        done: set[tuple[nn.Module, str]] = set()
        with watched_modules(model):
            while self.todo:
                module, call = self.todo.pop()
                if (module, repr(call)) not in done and not _is_operator(module):
                    done.add((module, repr(call)))
                    self._visit(module, call)
            self._distrust_readers_of_what_is_written()
        self._hide({*_entries(model), *(module for module, _ in done)})
        for counted in self.counted.values():
            self.traces.uses += counted
        self.traces.uses |= Counter(self.names[child] for parent in self.names for _, child in parts(parent))

    def _visit(self, module: nn.Module, call: Call) -> None:
        path = self.names[module]
        seen, graphs = Seen(), list[fx.Graph]()
        try:
            graphs = self._ways(module, call, seen)
        except Exception as error:  # whatever a stranger's forward may raise on a value that is not there
            self.traces.untraceable[path] = _first_line(error)
        changed = [_place_of(module, node) for graph in graphs for node in changed_weights(graph)]
        both = seen.reads, [*seen.writes, *changed]
        reads, writes = ([(m, name) for m, name in pairs if m in self.names] for pairs in both)
        for other, name in reads:  # of the tree: a module that a forward makes as it runs (layers[1:]) is not
            self.read.append((module, other, name))
            self.traces.exposed.setdefault(self.names[other], f"{_called(path, module)} uses its `{name}`")
        for other, name in writes:
            self.written.setdefault(other, set()).add(name)
            if other is not module:
                why = f"{_called(path, module)} sets its `{name}` while it runs"
                for inner in other.modules():
                    self.traces.exposed.setdefault(self.names[inner], why)
        if seen.contexts:
            self.traces.contexts.setdefault(path, seen.contexts[0])
        for graph in graphs:
            self._count(path, module, graph)
        if graphs:
            self.calls.setdefault(module, []).append((call, graphs))

    def _count(self, path: str, module: nn.Module, graph: fx.Graph) -> None:
        """Note what one way of a forward uses, and what remains to be visited."""
        counted: Counter[str] = Counter()
        for node in graph.nodes:
            owner = _owner(node)
            if owner is not None:
                used = module.get_submodule(owner)
                counted[self.names[used]] += 1
                inside = owner.split(".")
                self._expose(path, module, inside if node.op == "get_attr" else inside[:-1])
            if node.op == "call_module":
                call = self._call_of(module, node, used)
                self.todo.append((used, call))
                if path in self.traces.open and any(not isinstance(v, Slot) for v in (*call.args, *call.kwargs.values())):
                    self.traces.open.setdefault(self.names[used], call.leaves_open(used))  # it may come from the user
                if not called_as_torch_does(used):
                    self.traces.contexts.setdefault(path, f"the __call__ of {_called(self.names[used], used)}")
                if call != ONE_INPUT:
                    self.traces.exposed.setdefault(self.names[used], f"{_called(path, module)} calls it with more than its input")
                    self.read.append((module, used, ARGUMENTS))
        self.counted[path] = self.counted.get(path, Counter()) | counted
        self.traces.graphs.setdefault(path, []).append(graph)

    def _call_of(self, module: nn.Module, node: fx.Node, used: nn.Module) -> Call:
        """Return how a forward calls a child; what it passes is looked into where the child asks whether that is a tensor."""
        call = Call.of(node)
        try:
            if not _is_operator(used):
                self._ways(used, call, Seen())
        except AsksTypeError as question:
            if question.node.op == "placeholder":
                for n in node.all_input_nodes:
                    self._is_tensor(module, n)
                return Call.of(node)
        except Exception:  # as in `_visit`, where it is met again
            return call
        return call

    def _ways(self, module: nn.Module, call: Call, seen: Seen) -> list[fx.Graph]:
        """Trace a forward, or look up what that gave the last time."""
        key = module, call.key
        if key not in self.known:
            did = Seen()
            try:
                self.known[key] = self._explored(module, call, did, Assumed()), did
            except Exception as error:  # as in `_visit`
                self.known[key] = error, did
        found, did = self.known[key]
        seen.add(did)
        if isinstance(found, Exception):
            raise found
        return found

    def _explored(self, module: nn.Module, call: Call, seen: Seen, assumed: Assumed) -> list[fx.Graph]:
        """Trace a forward; again where more could be found out of a value: that it is a tensor, or a list and how long."""
        while True:
            try:
                found = ways(module, call, seen, assumed)
            except AsksTypeError as question:
                if question.value in assumed.tensors or not self._is_tensor(module, question.node):
                    raise
                assumed = replace(assumed, tensors=assumed.tensors | {question.value})
            except AsksPartsError as question:
                if question.value in assumed.lists or (parts := self._parts(module, question.node)) is None:
                    raise
                assumed = replace(assumed, lists={**assumed.lists, question.value: parts})
            else:
                lists = dict(item for graph in found for item in self._lists(module, graph)) | assumed.lists
                if lists == assumed.lists:
                    return found
                assumed = replace(assumed, lists=lists)

    def _lists(self, module: nn.Module, graph: fx.Graph) -> Iterator[tuple[Any, tuple[type, int]]]:
        """Yield the values that a child returns and another one gets, and are lists or tuples, with how many parts they have."""
        for node in graph.find_nodes(op="call_module"):
            if any(n.op == "call_module" and node in (*n.args, *n.kwargs.values()) for n in node.users):
                parts = self._parts(module, node)
                if parts is not None:
                    yield node.meta[VALUE], parts

    def _parts(self, module: nn.Module, node: fx.Node) -> tuple[type, int] | None:
        """Return whether a child returns a list or a tuple, and of how many parts, if that is the same on each of its ways."""
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if child is None or _is_operator(child):
            return None
        outs = self._returned(child, Call.of(node))
        kinds = {(list if isinstance(out, list) else type(out), len(out)) for out in outs if isinstance(out, list | tuple)}
        return kinds.pop() if len(kinds) == 1 and all(isinstance(out, list | tuple) for out in outs) else None

    def _returned(self, module: nn.Module, call: Call) -> list[Any]:
        """Return what a forward returns on each of its ways, nodes in the place of values; nothing where it cannot be traced."""
        try:
            return [n.args[0] for graph in self._ways(module, call, Seen()) for n in graph.find_nodes(op="output")]
        except Exception:  # as in `_visit`
            return []

    def _is_tensor(self, module: nn.Module, node: fx.Node) -> bool:
        """Tell whether the value of a node in the forward of `module` is known to be one tensor, and no list of them."""
        if not node.meta.get(TENSOR):
            node.meta[TENSOR] = self._makes_tensor(module, node)
        return bool(node.meta[TENSOR])

    def _makes_tensor(self, module: nn.Module, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return node.target in {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            if _is_operator(child) and type(child) is not nn.Identity:
                return gives_tensor(child)
            if self._returns_tensor(child, Call.of(node)):
                return True
            inputs = [n for n in node.all_input_nodes if not n.meta.get(TENSOR)]  # may be what it returns
            return bool(inputs) and all(self._is_tensor(module, n) for n in inputs) and self._returns_tensor(child, Call.of(node))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name in TENSOR_CALLS and any(self._is_tensor(module, n) for n in node.all_input_nodes)

    def _returns_tensor(self, module: nn.Module, call: Call) -> bool:
        outs = self._returned(module, call)
        return bool(outs) and all(isinstance(out, fx.Node) and self._is_tensor(module, out) for out in outs)

    def _expose(self, path: str, module: nn.Module, owners: list[str]) -> None:
        """Note that what lies between a module and what its forward uses is not called as a whole."""
        for i in range(len(owners)):
            between = module.get_submodule(".".join(owners[: i + 1]))
            self.traces.exposed.setdefault(self.names[between], f"{_called(path, module)} uses a part of it")

    def _distrust_readers_of_what_is_written(self) -> None:
        """Drop the trace of each forward that reads what another one writes: a run may go another way."""
        self._follow_lists()
        for reader, owner, name in self.read:
            if name in self.written.get(owner, ()):
                why = f"it reads `{name}`, which {_called(self.names[owner], owner)} sets while it runs"
                self.traces.untraceable.setdefault(self.names[reader], why)

    def _follow_lists(self) -> None:
        """Forgive a module that changes a list which it is given, where none that calls it looks at that list again."""
        callers = [(caller, of) for caller, of, name in self.read if name == ARGUMENTS]
        changing = {m: self._left_by(m, self.known) for m, names in self.written.items() if ARGUMENTS in names and m in self.calls}
        found = True
        while found:
            kept = {caller: self._with_changed(caller, changing) for caller, of in callers if of in changing}
            # those that hand a list on to one of these, which they were given themselves
            handing = {c for c, known in kept.items() if known and any((c, ARGUMENTS) in did.writes for _, did in known.values())}
            found = bool(handing - changing.keys())
            changing |= {caller: self._left_by(caller, kept[caller] or {}) for caller in handing}
        for module in changing:
            self.written.setdefault(module, set()).add(ARGUMENTS)
            if all(kept[caller] is not None for caller, of in callers if of is module):
                self.written[module].discard(ARGUMENTS)
                self.traces.contexts.setdefault(self.names[module], "a change of a list that it is given")

    def _with_changed(self, module: nn.Module, changing: dict[nn.Module, Any]) -> dict[Any, tuple[Any, Seen]] | None:
        """Return what a forward does if these change the lists that it gives them; None, if it then computes another thing."""
        known = {}
        try:
            for call, graphs in self.calls[module]:
                did = Seen()
                found = self._explored(module, call, did, Assumed(changed=changing))
                if [str(graph) for graph in found] != [str(graph) for graph in graphs]:
                    return None
                known[module, call.key] = found, did
        except Exception:  # as in `_visit`
            return None
        return known

    def _left_by(self, module: nn.Module, known: dict[Any, tuple[Any, Seen]]) -> dict[Any, Any]:
        """Return how a module leaves the lists that it is given, by `Call.key`, where that is the same on each of its ways."""
        found = {call.key: set(known[module, call.key][1].left) for call, _ in self.calls[module]}
        return {key: left.pop() for key, left in found.items() if len(left) == 1 and None not in left}

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
    """Yield the modules that a user calls: the model, or if it is a ModuleList or a ModuleDict, those that it holds."""
    if not _has_no_forward(model):
        yield model
    else:
        for _, child in parts(model):
            yield from _entries(child)


def _place_of(module: nn.Module, node: fx.Node) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor which the forward of `module` uses, and its name there."""
    owner, _, name = str(node.target).rpartition(".")
    return module.get_submodule(owner), name


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _is_operator(module: nn.Module) -> bool:
    """Tell whether a module's type says all: a batch norm, or one of PyTorch's own or a registered one with nothing inside."""
    known = type(module).__module__.startswith("torch.nn.") or as_linear.reader(module) is not None
    return is_batch_norm(module) or (known and not parts(module))


def _owner(node: fx.Node) -> str | None:
    """Return the module below the traced one that a node calls, or takes a tensor of."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rpartition(".")[0] or None if node.op == "get_attr" else None


def _called(path: str, module: nn.Module) -> str:
    return path or type(module).__name__


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return textwrap.shorten(text, 80, placeholder=" ...") or type(error).__name__
