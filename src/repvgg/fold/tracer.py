"""Trace one forward for one call: every module that it calls is a leaf, and what it does to modules besides is noted."""

import gc
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

from repvgg.fold.call import TENSOR, Call, Slot
from repvgg.fold.conditions import catches, demand, needed_truth
from repvgg.fold.contexts import watched_contexts


def kept(value: Any) -> Any:
    """Stand in a graph for a place, unknown to the graph, that holds `value` after the forward is done."""
    return value


@dataclass
class Seen:
    """List the attributes of modules that a forward read (of others) or wrote (of any), and contexts."""

    reads: list[tuple[nn.Module, str]] = field(default_factory=list)
    writes: list[tuple[nn.Module, str]] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)  # that it worked under (see contexts.py)


class AsksTypeError(TypeError):
    """A forward asks (`isinstance`) of what type the value of `node` is, and nobody has said."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__("it asks what type a value is")
        self.node = node


def traced(module: nn.Module, call: Call, seen: Seen, tensors: Collection[str] = ()) -> fx.Graph:
    """Trace the forward of `module` as it is called. What it reads and writes goes into `seen`; what it wrote is put back.

    tensors: the names of nodes that are known to be tensors. Raises `AsksTypeError` where a forward asks it of another.
    """
    tracer, held, homeless = _Tracer(call, seen, tensors), set(vars(module)), False
    try:
        graph = tracer.trace(module)
        if tracer.refused is not None:
            raise tracer.refused
        if tracer.undo:  # it has a state: does it do the same the next time?
            again = _Tracer(call, seen, tensors)
            try:
                if str(again.trace(module)) != str(graph):
                    raise ValueError("it does something else each time")
            finally:
                again.restore()
    finally:
        seen.writes += [(holder, name) for holder, name, value, before in tracer.held if _contents(value) != before]
        tracer.restore()
        for name in vars(module).keys() - held:  # constants, which fx has put there
            del vars(module)[name]
            homeless = True
    if homeless:
        raise ValueError("it uses a tensor that no module holds")
    if repr(tracer.given) != tracer.as_given:
        seen.writes.append((module, ARGUMENTS))
    tracer.given = None
    tracer.mark_kept(graph)
    return graph


def _contents(value: Any) -> Any:
    """Return what is in a list, dictionary or set, and in those inside it, in a form that tells whether it has changed."""
    if isinstance(value, dict):
        return [(key, _contents(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [type(value), *map(_contents, value)]
    return sorted(map(id, value)) if isinstance(value, set) else id(value)


ARGUMENTS = "a list or dictionary that it is given"
MACHINERY = {*dir(nn.Module), *vars(nn.Module())}  # what every module has says nothing about what one does


class _Here(threading.local):
    """Say which tracer is at work in this thread. What a trace changes (`nn.Module`, fx) it changes for all threads."""

    tracer: "_Tracer | None" = None


_here = _Here()


@contextmanager
def watched_modules() -> Iterator[None]:
    """Let tracers see what forwards do to modules, as long as this lasts. (To change `nn.Module` takes long: once for many.)"""
    plain_get, plain_set = nn.Module.__getattribute__, nn.Module.__setattr__

    def get(module: nn.Module, name: str) -> Any:
        tracer = _here.tracer
        if tracer is None or not tracer.watching or module is tracer.root or name in MACHINERY:
            return plain_get(module, name)
        tracer.seen.reads.append((module, name))  # before it: a parameter is found in another way than this
        value = plain_get(module, name)
        if isinstance(value, list | dict | set):  # which may be changed as well as read
            tracer.held.append((module, name, value, _contents(value)))
        return value

    def set_(module: nn.Module, name: str, value: Any) -> None:
        tracer = _here.tracer
        if tracer is None:
            plain_set(module, name, value)
            return
        if tracer.watching:
            tracer.note_write(module, name)
        tracer._quietly(lambda: plain_set(module, name, value))

    def note(context: str) -> None:
        if (tracer := _here.tracer) is not None and tracer.watching:
            tracer.seen.contexts.append(context)

    nn.Module.__getattribute__, nn.Module.__setattr__ = get, set_  # type: ignore[method-assign, assignment]
    try:
        with watched_contexts(note):
            yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain_set  # type: ignore[method-assign]


PROXY_FILE = fx.Proxy.__bool__.__code__.co_filename


class _Tracer(fx.Tracer):
    """Trace one module's own forward for one call; every module that it calls is a leaf."""

    def __init__(self, call: Call, seen: Seen, tensors: Collection[str]) -> None:
        super().__init__()
        self.call, self.seen, self.tensors = call, seen, tensors
        self.given: Any = None  # the arguments, and how they looked before the forward
        self.as_given = ""
        self.held: list[tuple[nn.Module, str, Any, Any]] = []  # lists and the like that modules hold, and what was in them
        self.undo: list[tuple[dict[str, Any], str, Any]] = []
        self.watching = False
        self.refused: Exception | None = None
        self.alive: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over the parts of a value, where the call that makes them says how many there are."""
        if (parts := _parts_of(obj.node)) is not None:
            return iter([obj[i] for i in range(parts)])  # type: ignore[index]
        with self._refusing():
            found: Iterator[Any] = super().iter(obj)
        return found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies: dict[int, fx.Proxy] = {}

        def filled(value: Any) -> Any:
            if isinstance(value, Slot):
                if value.number not in proxies:
                    proxies[value.number] = self.create_proxy("placeholder", f"input_{value.number}", (), {})
                    proxies[value.number].node.meta[TENSOR] = value.tensor
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

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return what a condition has to be so that the forward does not raise, and demand it in the graph."""
        frames, at = list[FrameType](), sys._getframe(1)
        while at.f_code.co_filename != __file__ and at.f_back is not None:  # the caller of the forward
            frames += [at] if at.f_code.co_filename != PROXY_FILE else []
            at = at.f_back
        frame, *callers = frames
        truth = None if any(map(catches, callers)) else needed_truth(frame, obj.node.target)
        if truth is None:
            with self._refusing():
                return super().to_bool(obj)
        where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
        self.create_proxy("call_function", demand, (obj, truth, where), {})
        return truth

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Remember what is raised: the forward may catch it, and go on as it never would."""
        try:
            yield
        except Exception as error:
            self.refused = self.refused or error
            raise

    # ------------------------------------------------------------ what the forward does to modules, not to values

    @contextmanager
    def _watch(self) -> Iterator[None]:
        self.watching = True
        before, _here.tracer = _here.tracer, self
        try:
            yield
        finally:
            _here.tracer = before
            self.watching = False

    def note_write(self, module: nn.Module, name: str) -> None:
        self.seen.writes.append((module, name))
        home = next((d for d in (module._buffers, module._parameters, module._modules) if name in d), vars(module))
        self.undo.append((home, name, home.get(name, _MISSING)))

    def restore(self) -> None:
        """Put the attributes that the forward wrote back as they were."""
        for home, name, value in reversed(self.undo):
            if value is _MISSING:
                home.pop(name, None)
            else:
                home[name] = value

    def _quietly(self, do: Callable[[], Any]) -> Any:
        """Do something without noting it: the tracer's own look at modules is no use of them."""
        watching, self.watching = self.watching, False
        try:
            return do()
        finally:
            self.watching = watching

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if _here.tracer is not self:  # another thread's
            return attr_val
        return self._quietly(lambda: super(_Tracer, self).getattr(attr, attr_val, parameter_proxy_cache))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _here.tracer is not self:
            return forward(*args, **kwargs)
        return self._quietly(lambda: super(_Tracer, self).call_module(m, forward, args, kwargs))

    def create_arg(self, a: Any) -> Any:
        return self._quietly(lambda: super(_Tracer, self).create_arg(a))

    # ---------------------------------------------------------------------------- values that outlive the forward

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.name in self.tensors:
            node.meta[TENSOR] = True
        made = _Value(node, self)
        self.alive.append((node, weakref.ref(made)))
        return made

    def mark_kept(self, graph: fx.Graph) -> None:
        """Give each value that something still holds, now that the forward is done, one more user."""
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
    """Stand for a value in a trace. A forward that asks (`isinstance`) what type it has is told of tensors alone."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override, misc]
        if not self.tracer.watching:  # type: ignore[attr-defined]
            return _Value
        if self.node.meta.get(TENSOR):
            return Tensor
        with self.tracer._refusing():  # type: ignore[attr-defined]
            raise AsksTypeError(self.node)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse `x.data = y`, of which a trace sees nothing."""
        if name not in ("node", "tracer"):
            raise ValueError(f"it sets `{name}` of a value")
        super().__setattr__(name, value)

    def changed(self, how: Callable[..., Any], plain: Callable[..., Any], other: Any) -> Any:
        """Return what `how` makes of the value in place; of a number, what `plain` does."""
        return self.tracer.create_proxy("call_function", plain if _is_size(self.node) else how, (self, other), {})

    def __len__(self) -> int:
        parts = _parts_of(self.node)
        with self.tracer._refusing():  # type: ignore[attr-defined]
            return super().__len__() if parts is None else parts


# `x += y` and its like, which fx takes for `x = x + y`: by the plain operator
IN_PLACE = {
    getattr(operator, name, None) or getattr(operator, f"{name}_"): getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
for _plain, _how in IN_PLACE.items():
    setattr(_Value, f"__{_how.__name__}__", lambda a, b, how=_how, plain=_plain: a.changed(how, plain, b))


def _is_size(node: fx.Node) -> bool:
    """Tell whether a value is a number or a tuple, which nothing changes in place: a size, or what was made of sizes."""
    if node.op == "call_method" or node.target is getattr:
        return (node.target if node.op == "call_method" else node.args[1]) in ("size", "shape", "dim", "ndim", "numel")
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_size, node.all_input_nodes))


def _parts_of(node: fx.Node) -> int | None:
    """Return how many parts a value has, where the call that makes it says so (of `x.shape[:2]`, if it has them)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    how = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None)
    if name == "chunk" and isinstance(how, int):
        return how
    if name == "getitem" and isinstance(how, slice) and _is_size(node.args[0]):  # type: ignore[arg-type]
        if any(isinstance(end, fx.Node) for end in (how.start, how.stop, how.step)):
            return None
        counts = {len(range(*how.indices(dimensions))) for dimensions in (8, 9)}
        return counts.pop() if len(counts) == 1 else None
    return len(how) if name in ("split", "split_with_sizes") and isinstance(how, tuple | list) else None


_MISSING = object()
