"""Hold what a trace takes for granted, what it finds out besides its graph, and what all traces of a network show."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from repvgg.fold.call import Call

MISSING = object()  # an attribute that a module does not have
UNKNOWN = object()  # what an earlier call may have left in one: any value, but no None, truth or word


@dataclass(frozen=True)
class Held:
    """Hold what is in a list or a dictionary: its keys or numbers, and of what kind each value is."""

    made_of: type
    parts: tuple[tuple[Any, Any], ...]

    def filled(self, fill: Callable[[Any], Any]) -> Any:
        """Return such a list or dictionary, of what `fill` makes of each kind."""
        made = {key: fill(kind) for key, kind in self.parts}
        return made if self.made_of is dict else list(made.values())


def kind_of(value: Any) -> Any:
    """Return what a forward can tell of an attribute's value without asking: None, a truth, a word, that it is not there, and of a
    list or a dictionary how many values there are, and of what kind. Raises ValueError for a module, which might be called."""
    if type(value) in (list, dict):
        parts = value.items() if type(value) is dict else enumerate(value)
        return Held(type(value), tuple((key, kind_of(inner)) for key, inner in parts))
    if any(isinstance(part, nn.Module) for part in torch.utils._pytree.tree_leaves(value)):
        raise ValueError("it keeps a module for its next call")
    return value if value is None or value is MISSING or type(value) in (bool, str) else UNKNOWN


def elsewhere(name: str) -> Any:
    """Stand in a graph for a tensor that no module holds, or for what an earlier call has left in an attribute."""
    raise RuntimeError(name)  # whoever reads a graph does not know it either


def kept(value: Any) -> Any:
    """Stand in a graph for a place, unknown to the graph, that holds `value` after the forward is done."""
    return value


@dataclass
class Seen:
    """List the attributes of modules that a forward read (of others) or wrote (of any), contexts, and how it left its arguments."""

    reads: list[tuple[nn.Module, str]] = field(default_factory=list)
    writes: list[tuple[nn.Module, str]] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)  # that it worked under (see contexts.py)
    left: list[Any] = field(default_factory=list)  # what is in the lists that it is given (see `left_in`)
    states: dict[str, set[Any]] = field(default_factory=dict)  # what its own attributes may be at its next call (see `kind_of`)

    def add(self, other: "Seen") -> None:
        self.reads += other.reads
        self.writes += other.writes
        self.contexts += other.contexts
        self.left += other.left
        for name, kinds in other.states.items():
            self.states.setdefault(name, set()).update(kinds)


@dataclass(frozen=True)
class Question:
    """A forward's asking whether the value of `node` is true, the answer that it got, and where it asks."""

    node: fx.Node
    answer: bool
    where: str


@dataclass(frozen=True)
class Assumed:
    """List what a trace takes for granted.

    answers: to the forward's first questions (the later ones get yes). tensors: the values that are known to be tensors, as
    `AsksTypeError.value`; lists: those that are known to be lists or tuples, and of how many parts. changed: what calls of modules
    leave of the lists that they are given, by module and `Call.key`. states: what earlier calls have left in its own attributes.
    """

    answers: tuple[bool, ...] = ()
    tensors: frozenset[Any] = frozenset()
    lists: dict[Any, tuple[type, int]] = field(default_factory=dict)
    changed: dict[Any, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


@dataclass
class Traces:
    """Hold what the forwards of a network show. A module's path is the first one under which `named_modules` lists it.

    graphs: by module, its forward with its children as leaves, once for each way that it may go. The targets of call_module
        and get_attr nodes are relative to that module. A value that the forward keeps somewhere besides returning it
        (`self.raw = y`) has one user more, a call of `kept`.
    uses: by module, how many places call it or use a tensor of it, or how many hold it, whichever is more.
    exposed: modules that are used in another way than by calling them with one input, with the reason: their attributes, a part
        of them, more arguments.
    hidden: modules of which not every use can be seen, with the reason. So a part of them must not be changed.
    untraceable: modules whose forward cannot be traced, with what went wrong. All that they hold is hidden.
    open: modules that a user calls, or that get what one may have passed, and what else that may be: then they may do otherwise.
    contexts: modules whose forwards work under what a graph does not show (`torch.autocast`, a child's own `__call__`).
    call: how the model is called, where an example says so.
    """

    graphs: dict[str, list[fx.Graph]] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    exposed: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, str] = field(default_factory=dict)
    call: Call | None = None

    def below(self, paths: Collection[str]) -> set[str]:
        """Return the traced modules that lie at or below one of these paths."""
        return {p for p in self.graphs if any(p == path or p.startswith(f"{path}.") or not path for path in paths)}

    def why_not_replaced(self, path: str) -> str | None:
        """Return why nothing that computes more than this module may take its place, if so."""
        if self.uses[path] > 1:
            return "is used in more than one place"
        if reason := self.exposed.get(path) or self.hidden.get(path):
            return f"may be used in ways that cannot be seen: {reason}"
        return None


def set_apart(graph: fx.Graph, strays: Collection[str]) -> None:
    """Put `elsewhere` in the place of tensors that no module holds."""
    for node in graph.find_nodes(op="get_attr"):
        if node.target in strays:
            with graph.inserting_before(node):
                stand = graph.call_function(elsewhere, (node.target,))
            node.replace_all_uses_with(stand)
            graph.erase_node(node)


def forget_states(graph: fx.Graph) -> None:
    """Take out what is made of states alone and goes into nothing: how often it was called, say."""
    made_of_states = set[fx.Node]()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target is elsewhere or (node.op == "call_function" and inputs and made_of_states.issuperset(inputs)):
            made_of_states.add(node)
    for node in reversed(graph.nodes):
        if node in made_of_states and not node.users:
            graph.erase_node(node)
