"""Trace one forward for one call: every module that it calls is a leaf, and what it does to modules besides is noted."""

import dis
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from repvgg.fold.call import TENSOR, Call, Slot, contents, lasting, leave, left_in, own_lists, restored
from repvgg.fold.contexts import WatchedTensors, memory, watched_contexts, watched_factories
from repvgg.fold.guards import chosen_forward
from repvgg.fold.seen import MISSING, UNKNOWN, Assumed, Held, Question, Seen, elsewhere, forget_states, kept, kind_of, set_apart
from repvgg.fold.values import VALUE, AsksPartsError, ValueOf, is_size, parts_of


def traced(module: nn.Module, call: Call, seen: Seen, assumed: Assumed, more: bool) -> tuple[fx.Graph | None, list[Question]]:
    """Trace one way of the forward of `module`, called so. What it reads and writes goes into `seen`; what it wrote is put back.

    more: whether it may ask questions that are not answered yet. Returns no graph where the forward raises an error of its own,
    after a question. Raises `AsksTypeError` where a forward asks whether another value is a tensor, `AsksPartsError` where it takes
    one apart, and what else keeps it from being traced.
    """
    tracer, held, strays = _Tracer(call, seen, assumed, more), set(vars(module)), dict[str, Any]()
    lists = own_lists(module)
    graph = None
    try:
        graph = tracer.once(module)
    finally:
        seen.writes += [(holder, name) for holder, name, value, before in tracer.held if contents(value) != before]
        left, changed = tracer.restore(), restored(lists)
        for name in vars(module).keys() - held:  # constants, which fx has put there
            strays[name] = vars(module).pop(name)
    for name, value in changed.items():
        seen.writes.append((module, name))
        if name not in vars(module) or type(value) is set:
            raise ValueError(f"it changes `{name}`, which outlives it")
    for owner, name, value in (*left, *((module, *item) for item in changed.items())):
        if isinstance(value, nn.Module):
            raise ValueError(f"it sets `{name}`, a module")
        if owner is module:
            seen.states.setdefault(name, set()).add(kind_of(value))
    if graph is None:
        return None, tracer.questions
    if strays:
        tracer.refuse_shared(strays.values())
        seen.contexts.append("a tensor that no module holds")
        set_apart(graph, strays)
    forget_states(graph)
    if repr(tracer.given) != tracer.as_given:
        seen.writes.append((module, ARGUMENTS))
    seen.left.append(left_in(tracer.given))
    tracer.given = None
    tracer.mark_kept(graph)  # those in `left` and `changed` too
    return graph, tracer.questions


def _raised_on_purpose(error: Exception) -> bool:
    """Tell whether a forward's own `raise` or `assert` raised it, and not while it handled another error."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or error.__context__ is not None or at.tb_frame.f_code.co_filename.startswith(TORCH):
        return False
    return dis.opname[at.tb_frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"


ARGUMENTS = "a list or dictionary that it is given"
MACHINERY = {*dir(nn.Module), *vars(nn.Module())}  # what every module has says nothing about what one does


class _Here(threading.local):
    """Say which tracer is at work in this thread. What a trace changes (`nn.Module`, fx) it changes for all threads."""

    tracer: "_Tracer | None" = None
    memory: frozenset[int] = frozenset()  # of the tensors that the modules of the network hold


_here = _Here()


@contextmanager
def watched_modules(model: nn.Module) -> Iterator[None]:
    """Let tracers see what forwards do to these modules, as long as this lasts. (To change `nn.Module` takes long.)"""
    _here.memory = frozenset(memory(t) for t in (*model.parameters(), *model.buffers()))
    plain_get, plain_set = nn.Module.__getattribute__, nn.Module.__setattr__

    def get(module: nn.Module, name: str) -> Any:
        tracer = _here.tracer
        if tracer is None or not tracer.watching or module is tracer.root or name in MACHINERY:
            return plain_get(module, name)
        tracer.seen.reads.append((module, name))  # before it: a parameter is found in another way than this
        value = plain_get(module, name)
        if isinstance(value, list | dict | set):  # which may be changed as well as read
            tracer.held.append((module, name, value, contents(value)))
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
        with watched_contexts(note), watched_factories():
            yield
    finally:
        _here.memory = frozenset()
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain_set  # type: ignore[method-assign]


TORCH = f"{Path(torch.__file__).parent}{os.sep}"
MOST_QUESTIONS = 12  # of one way: a loop may ask forever


class _Tracer(fx.Tracer):
    """Trace one module's own forward for one call; every module that it calls is a leaf."""

    proxy_buffer_attributes = True  # what is made of a buffer is followed, as what is made of a parameter

    def __init__(self, call: Call, seen: Seen, assumed: Assumed, more: bool) -> None:
        super().__init__()
        self.call, self.seen, self.assumed, self.more = call, seen, assumed, more
        self.questions: list[Question] = []
        self.given: Any = None  # the arguments, and how they looked before the forward
        self.as_given = ""
        self.held: list[tuple[nn.Module, str, Any, Any]] = []  # lists and the like that modules hold, and what was in them
        self.undo: list[tuple[nn.Module, str, dict[str, Any], Any]] = []  # what it wrote, where that was, and what it was
        self.watching = False
        self.refused: Exception | None = None
        self.alive: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over the parts of a value, where the call that makes them says how many there are."""
        if (parts := parts_of(obj.node)) is not None:
            return iter([obj[i] for i in range(parts)])  # type: ignore[index]
        with self._refusing():
            try:
                found: Iterator[Any] = super().iter(obj)
            except fx.proxy.TraceError as error:
                raise AsksPartsError(str(error), obj.node) from error
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
                made = [filled(v) for v in value]
                return tuple(made) if isinstance(value, tuple) else made  # a plain one, which the forward may change
            return {key: filled(v) for key, v in value.items()} if isinstance(value, dict) else value

        args, kwargs = filled(tuple(self.call.args)), filled(dict(self.call.kwargs))
        self.given, self.as_given = (args, kwargs), repr((args, kwargs))

        def forward(*args: Any) -> Any:
            self._recall()
            with self._watch():
                made = root_fn(*args, **kwargs)
            if isinstance(made, dict | list) and type(made) not in (dict, list):  # which a graph makes a plain one of
                self.seen.contexts.append(f"a class of its own for what it returns ({type(made).__name__})")
            return made

        return forward, [self.root, *args]

    def once(self, module: nn.Module) -> fx.Graph | None:
        """Return the graph of the forward's one way, or None where it raises an error of its own on it."""
        self.traced_func_name = chosen_forward(module) or "forward"
        try:
            graph = self.trace(module)
        except Exception as error:
            if self.refused is None and self.questions and _raised_on_purpose(error):
                return None
            raise
        if self.refused is not None:  # the forward has caught it, and gone on as it never would
            raise self.refused
        return graph

    def to_bool(self, obj: fx.Proxy) -> bool:
        for question in self.questions:
            if question.node is obj.node and is_size(obj.node):  # nothing can have changed it
                return question.answer
        known, at = self.assumed.answers, len(self.questions)
        if at >= len(known) and (not self.more or at >= MOST_QUESTIONS):
            with self._refusing():
                return super().to_bool(obj)
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(TORCH) and frame.f_back is not None:
            frame = frame.f_back
        answer = known[at] if at < len(known) else True
        self.questions.append(Question(obj.node, answer, f"{frame.f_code.co_qualname}, line {frame.f_lineno}"))
        return answer

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Remember what is raised: the forward may catch it."""
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
            with WatchedTensors(self.refuse_shared):
                yield
        finally:
            _here.tracer = before
            self.watching = False

    def refuse_shared(self, tensors: Iterable[torch.Tensor]) -> None:
        """Refuse to use tensors of the network that the forward has from elsewhere than a module: it may change them."""
        with self._refusing():
            if not _here.memory.isdisjoint(map(memory, tensors)):
                raise ValueError("it uses a tensor of a module that it finds in another place")

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        if (now := _here.tracer) not in (None, self):  # a value of another trace, which a list has kept, say
            with now._refusing():
                raise ValueError("it uses what another forward has left somewhere")
        return super().create_proxy(*args, **kwargs)

    def note_write(self, module: nn.Module, name: str) -> None:
        self.seen.writes.append((module, name))
        self._before_change(module, name)

    def _before_change(self, module: nn.Module, name: str) -> dict[str, Any]:
        home: dict[str, Any] = _home(module, name)
        self.undo.append((module, name, home, home.get(name, MISSING)))
        return home

    def _recall(self) -> None:
        """Put what earlier calls may have left into the attributes of the module that is traced."""

        def left(name: str, kind: Any) -> Any:
            if isinstance(kind, Held):
                return kind.filled(partial(left, name))
            return self.create_proxy("call_function", elsewhere, (name,), {}) if kind is UNKNOWN else kind

        for name, kind in self.assumed.states.items():
            if kind is not MISSING:
                self._before_change(self.root, name)[name] = left(name, kind)

    def restore(self) -> list[tuple[nn.Module, str, Any]]:
        """Put the attributes that the forward wrote back as they were; return what it left there."""
        left = [(module, name, _home(module, name).get(name, MISSING)) for module, name, *_ in self.undo]
        for module, name, home, value in reversed(self.undo):
            _home(module, name).pop(name, None)
            if value is not MISSING:
                home[name] = value
        return left

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
        made = self._quietly(lambda: super(_Tracer, self).call_module(m, forward, args, kwargs))
        if m in self.assumed.changed and any(type(v) in (list, dict, tuple) for v in (*args, *kwargs.values())):
            if not lasting(self.root).isdisjoint(map(id, (*args, *kwargs.values()))):
                raise ValueError("a list that outlives the forward is changed")
            leave((args, kwargs), self.assumed.changed[m][Call.of(made.node).key])
        kind, parts = self.assumed.lists.get(made.node.meta[VALUE], (list, None))
        return made if parts is None else kind(made[i] for i in range(parts))

    def create_arg(self, a: Any) -> Any:
        return self._quietly(lambda: super(_Tracer, self).create_arg(a))

    # ---------------------------------------------------------------------------- values that outlive the forward

    def proxy(self, node: fx.Node) -> fx.Proxy:
        node.meta[VALUE] = frozenset(self.assumed.states.items()), tuple(q.answer for q in self.questions), node.name
        if node.meta[VALUE] in self.assumed.tensors:
            node.meta[TENSOR] = True
        made = ValueOf(node, self)
        self.alive.append((node, weakref.ref(made)))
        return made

    def mark_kept(self, graph: fx.Graph) -> None:
        """Give each value that something still holds, now that the forward is done, one more user."""
        there = set(graph.nodes)
        computed = [(n, ref) for n, ref in self.alive if n in there and n.op not in ("get_attr", "placeholder")]
        for generation in (1, 2):  # what nobody holds may still await the garbage collector; all of it is rarely needed
            if any(ref() is not None for _, ref in computed):
                gc.collect(generation)
        output = next(node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(output):
            for node, ref in computed:
                if ref() is not None:
                    graph.call_function(kept, (node,))


def _home(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the dictionary of a module that an attribute is in."""
    inside = (module._buffers, module._parameters, module._modules)
    return next((d for d in inside if name in d), vars(module))  # type: ignore[return-value]
