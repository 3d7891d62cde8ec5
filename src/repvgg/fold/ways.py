"""Trace every way that a forward may go: where it asks for a value, which no trace has, it goes on with each answer in turn."""

from dataclasses import replace
from itertools import product
from typing import Any

from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from repvgg.fold.call import Call
from repvgg.fold.seen import MISSING, Assumed, Question, Seen, kind_of
from repvgg.fold.tracer import traced

MOST = 16  # ways of one forward
MOST_STATES = 8  # that earlier calls may have left it in


@fx.has_side_effect
def demand(value: Any, truth: bool, where: str) -> None:
    """Raise AssertionError where the truth of a value is not this: in a forward that is written anew, in place of its own error."""
    if has_torch_function_unary(value):  # a value of a trace
        handle_torch_function(demand, (value,), value, truth, where)
    elif bool(value) is not truth:
        raise AssertionError(f"the input is not what {where} demands")


def ways(module: nn.Module, call: Call, seen: Seen, assumed: Assumed) -> list[fx.Graph]:
    """Return one graph for each way that the forward of `module` may go, called so, after any earlier calls.

    What it does on any way goes into `seen`. A way on which it raises an error of its own is none. Where a single one is left, its
    graph demands what leads to it. Raises `AsksTypeError`, `AsksPartsError`, and whatever a forward raises that cannot be traced,
    or goes more than `MOST` ways.
    """
    did = Seen()
    try:
        found = _ways(module, call, did, assumed)
        return _in_each_state(module, call, did, assumed) if did.states else found
    finally:
        seen.add(did)


def _in_each_state(module: nn.Module, call: Call, did: Seen, assumed: Assumed) -> list[fx.Graph]:
    """Return the ways of a forward that sets attributes of its own, whatever earlier calls have left in them."""
    did.contexts.append("a state of its own")
    found: dict[str, fx.Graph] = {}
    tried = set[frozenset[Any]]()
    while True:
        for name, kinds in did.states.items():
            kinds.add(kind_of(getattr(module, name, MISSING)))
        in_order = (sorted(kinds, key=repr) for kinds in did.states.values())  # the same each time
        states = [dict(zip(did.states, kinds, strict=True)) for kinds in product(*in_order)]
        if len(states) > MOST_STATES:
            raise ValueError("it sets too many attributes of its own")
        new = [state for state in states if frozenset(state.items()) not in tried]
        if not new:
            return list(found.values())
        for state in new:
            tried.add(frozenset(state.items()))
            for graph in _ways(module, call, did, replace(assumed, states=state)):
                found.setdefault(str(graph), graph)


def _ways(module: nn.Module, call: Call, seen: Seen, assumed: Assumed) -> list[fx.Graph]:
    found: dict[str, tuple[fx.Graph, list[Question]]] = {}
    answers: tuple[bool, ...] | None = ()
    ended, tried = 0, 0
    while answers is not None:
        assumed, tried = replace(assumed, answers=answers), tried + 1
        graph, questions = traced(module, call, seen, assumed, more=tried < MOST)
        if graph is None:
            ended += 1
        else:
            found.setdefault(str(graph), (graph, questions))
        answers = _next([q.answer for q in questions])
    if not found:
        raise ValueError("it raises an error of its own, whatever it is given")
    if ended and ended == tried - 1:
        _demand(*next(iter(found.values())))
    elif ended:
        seen.contexts.append("checks of its own")
    return [graph for graph, _ in found.values()]


def _next(answers: list[bool]) -> tuple[bool, ...] | None:
    """Return the answers that lead to the next way: the last one that was yes is no."""
    while answers and not answers[-1]:
        answers.pop()
    return (*answers[:-1], False) if answers else None


def _demand(graph: fx.Graph, questions: list[Question]) -> None:
    for question in reversed(questions):
        with graph.inserting_after(question.node):
            graph.call_function(demand, (question.node, question.answer, question.where))
