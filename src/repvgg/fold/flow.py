"""Find the parts of a computation that are one linear map, whatever classes or files they come from.

A computation is a list of values, each made from earlier ones. A value whose operator is linear is a linear map of each earlier
value that all its paths come from: a batch norm of a convolution, a sum of branches, a part of a concatenation. `stretches` chooses
those maps that take the place of several operators and cost no more multiplications than these did. Front ends (`torch_graph.py`
for modules, `onnx_graph.py` for files) write a computation down as values, and write the stretches back.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repvgg.fold.algebra import LinearMap, ReparamError, concat, identity
from repvgg.fold.operators import Operator, concatenated, part_of_norm
from repvgg.fold.rounding import EPSILON

PART_BOUND = 1e-10  # relative error of one folded stretch in float64; rounding alone is some 1e-15
ROUNDINGS = 16  # of the largest number on the way, in units of its last place, that a stretch may be off where its numbers cancel
BLIND = 1e-6  # a bound beyond this could let a wrong fold pass
TINY = 1e-300


@dataclass(eq=False, repr=False)
class Value:
    """A value of a computation. Without an operator it is an input, or what something that is not linear gives.

    says: what makes it, for a reader of the report ("a ReLU"); why: what kept it from being read as linear.
    """

    name: str
    inputs: tuple["Value", ...] = ()
    operator: Operator | None = None
    says: str = ""
    why: str = ""

    @property
    def is_norm(self) -> bool:
        return self.operator is not None and self.operator.kind == "norm"

    def __repr__(self) -> str:
        return self.name


# ----------------------------------------------------------------------------------------------------------------- the pass


@dataclass(eq=False)
class Stretch:
    """`target` is the map `map` of `source`; of what computed it, `inside` (the target last) is needed by nothing else."""

    source: Value
    target: Value
    map: LinearMap
    inside: list[Value]

    def run(self, x: Tensor) -> Tensor:
        """Run its operators, one after the other."""
        return self.steps(x)[self.target]

    def steps(self, x: Tensor) -> dict[Value, Tensor]:
        """Return every value on the way from the source to the target, both included."""
        known = {self.source: x}

        def value(v: Value) -> Tensor:
            if v not in known:
                assert v.operator is not None
                known[v] = v.operator.run(*map(value, v.inputs))
            return known[v]

        value(self.target)
        return known


@dataclass
class Flow:
    """A computation: its values, each after those it is made from, and those of them that are read from outside.

    refuse: why a front end could not write a stretch, if so. left: batch norms that no stretch took in, and why. fallen: those of
    a concatenation that fell apart, so that their inputs are parts of them; with the concatenation and the operator that they had.
    """

    values: list[Value]
    outputs: set[Value] = field(default_factory=set)
    device: torch.device | str = "cpu"
    refuse: Callable[[Stretch], str | None] = lambda _: None
    left: dict[Value, str] = field(default_factory=dict)
    fallen: dict[Value, tuple[Value, Operator]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._read()
        for v in list(self.values):
            if v.is_norm:
                self._spread(v)
        self._read()

    def _spread(self, norm: Value) -> None:
        """A batch norm of concatenated convolutions becomes a concatenation of batch norms."""
        (together,) = norm.inputs
        if together.operator is None or together.operator.apply is not concat or together in self.outputs:
            return
        ends = [(p, p.operator.channels) for p in together.inputs if p.operator and p.operator.kind == "convolution"]
        if self.readers[together] != [norm] or any(self.readers[p] != [together] or p in self.outputs for p in together.inputs):
            return
        whole = _operator(norm)
        total, start, parts = whole.channels or 0, 0, []
        if len(ends) < len(together.inputs) or sum(count or 0 for _, count in ends) != total:
            return
        for i, (p, count) in enumerate(ends):
            assert count is not None
            parts.append(Value(f"{norm.name}.{i}", (p,), part_of_norm(whole, start, count, total), norm.says))
            start += count
        self.fallen[norm] = together, whole
        norm.inputs, norm.operator = tuple(parts), concatenated()
        at = self.values.index(norm)
        self.values[at:at] = parts
        self.values.remove(together)

    def _rejoin(self, norm: Value) -> None:
        """Make a batch norm that fell apart whole again."""
        parts, (together, whole) = norm.inputs, self.fallen.pop(norm)
        self.values[self.values.index(norm) : self.values.index(norm)] = [together]
        self.values = [v for v in self.values if v not in parts]
        norm.inputs, norm.operator = (together,), whole

    def _read(self) -> None:
        self.readers: dict[Value, list[Value]] = defaultdict(list)
        for v in self.values:
            for source in v.inputs:
                self.readers[source].append(v)
        self.channels = self._count_channels()

    def stretches(self) -> list[Stretch]:
        """Return each linear stretch that becomes one convolution, exactly and at no more multiplications than before."""
        while True:
            found = [stretch for part in self._parts() for stretch in _Part(self, part).stretches()]
            torn = [norm for norm in self.fallen if not self.left.keys().isdisjoint(norm.inputs)]
            if not torn:
                return found
            for norm in torn:  # a part of it is left over
                self._rejoin(norm)
            self.left.clear()
            self._read()

    def _count_channels(self) -> dict[Value, int]:
        count: dict[Value, int] = {}
        for v in self.values:
            if v.operator is None:
                continue
            if v.operator.reads is not None:
                count[v.inputs[0]] = v.operator.reads
            known = [count[i] for i in v.inputs if i in count]
            if v.operator.channels is not None:
                count[v] = v.operator.channels
            elif len(known) == len(v.inputs):
                count[v] = sum(known) if v.operator.apply is concat else max(known)
        for v in reversed(self.values):  # what a pool or a pad reads has as many channels as it gives
            if v in count and v.operator is not None and len(v.inputs) == 1 and v.operator.channels is None:
                count.setdefault(v.inputs[0], count[v])
        return count

    def _parts(self) -> list[list[Value]]:
        """Return the linear values that hang together; a sum of values with no common origin begins another part."""
        origins: dict[Value, set[Value]] = {}
        parts: dict[Value, list[Value]] = {}
        for v in self.values:
            common = set.intersection(*(origins[i] for i in v.inputs)) if v.operator is not None else set()
            origins[v] = common | {v}
            if common:
                joined = {id(parts[i]): parts[i] for i in v.inputs if i in parts}
                merged = [w for part in joined.values() for w in part] + [v]
                parts.update(dict.fromkeys(merged, merged))
        order = {v: n for n, v in enumerate(self.values)}
        return [sorted(part, key=order.__getitem__) for part in {id(part): part for part in parts.values()}.values()]


class _Part:
    """Linear values that hang together: the map of each from each earlier one, and the choice among them."""

    def __init__(self, flow: Flow, values: list[Value]) -> None:
        self.flow, self.values, self.mine = flow, values, set(values)
        self.maps: dict[Value, dict[Value, LinearMap]] = {}
        self.stuck: set[Value] = set()  # batch norms that cannot go into all that read them
        self.refusals: dict[tuple[Value, Value], str] = {}
        for v in values:
            for source in v.inputs:
                self.maps.setdefault(source, self._itself(source))
            self.maps[v] = self._maps_of(v)

    def _itself(self, v: Value) -> dict[Value, LinearMap]:
        count = self.flow.channels.get(v)
        return {} if count is None else {v: identity(count).to(self.flow.device)}

    def _maps_of(self, v: Value) -> dict[Value, LinearMap]:
        found = {}
        inputs = [self.maps[i] for i in v.inputs]
        for source in inputs[0]:
            if all(source in maps for maps in inputs):
                try:
                    found[source] = _operator(v).apply(*(maps[source] for maps in inputs))
                except ReparamError as error:
                    if error.path and len(self.flow.readers[v.inputs[0]]) == 1 and _kind(v.inputs[0]) == "convolution":
                        raise  # the tensor at that path is damaged
                    self.refusals[v, source] = error.reason
        return found | self._itself(v)

    def stretches(self) -> Iterator[Stretch]:
        """Choose, anew where a batch norm was to go into all its readers and one of them took something else."""
        while True:
            chosen, needed = self._choose()
            inside = {v for stretch in chosen for v in stretch.inside}
            stuck = {v for v in inside if v in needed and all(v is not s.target for s in chosen)}
            if not stuck:
                break
            self.stuck |= stuck
        self.flow.left |= {v: self._why_left(v) for v in self.values if v.is_norm and v in needed and v not in inside}
        return reversed(chosen)

    def _choose(self) -> tuple[list[Stretch], set[Value]]:
        chosen: list[Stretch] = []
        needed = {v for v in self.values if v in self.flow.outputs or not self.mine.issuperset(self.flow.readers[v])}
        for v in reversed(self.values):
            if v in needed:
                best = self._best(v, needed)
                needed.update({best.source} if best else v.inputs)
                if best:
                    chosen.append(best)
        return chosen, needed

    def _best(self, v: Value, needed: set[Value]) -> Stretch | None:
        """The stretch that ends in this value and spares most, or takes most in."""
        best, most = None, (0.0, 0)
        for source, m in self.maps[v].items():
            if source is v or self._takes_its_norm(source):
                continue
            inside = self._inside(source, v, needed)
            work = [w for w in inside if _operator(w).kind != "same"]
            if len(work) < 2 or not any(_operator(w).kind == "convolution" for w in work):
                continue
            spared = sum(self._cost(w, source) for w in inside) - _cost(m, m.kernel.numel())
            stretch = Stretch(source, v, m, inside)
            if spared >= 0 and (spared, len(inside)) > most:
                if why := self.flow.refuse(stretch):
                    self.refusals.setdefault((v, source), why)
                else:
                    best, most = stretch, (spared, len(inside))
        return best

    def _takes_its_norm(self, v: Value) -> bool:
        """A convolution before a batch norm: that goes into it, not into what comes next."""
        readers = self.flow.readers[v]
        return _kind(v) == "convolution" and len(readers) == 1 and readers[0].is_norm and v not in self.flow.outputs

    def _inside(self, source: Value, target: Value, needed: set[Value]) -> list[Value]:
        """Values between the two that nothing else reads, the target among them."""
        between, todo = {target}, [target]
        while todo:
            more = [i for i in todo.pop().inputs if i is not source and i not in between]
            between.update(more)
            todo += more
        inside: list[Value] = []
        for w in reversed(self.values):
            alone = w not in needed and all(r in inside for r in self.flow.readers[w])
            spreads = w not in needed and w.inputs[0] is source and self._spreads(w)
            if w in between and (w is target or alone or spreads):
                inside.insert(0, w)
        return inside

    def _spreads(self, v: Value) -> bool:
        """A batch norm that each of the convolutions which read it can take in, at no more multiplications."""
        if v in self.flow.outputs or v in self.stuck or not v.is_norm:
            return False
        maps = [(r, self.maps[r].get(v.inputs[0])) for r in self.flow.readers[v] if r in self.mine]
        return len(maps) == len(self.flow.readers[v]) and all(
            m is not None and _operator(r).kind == "convolution" and m.kernel.numel() <= _operator(r).multiplications
            for r, m in maps
        )

    def _cost(self, v: Value, source: Value) -> float:
        return _cost(self.maps[v][source], _operator(v).multiplications)

    def _why_left(self, v: Value) -> str:
        return f"{self._why_not_before(v)}, and {self._why_not_after(v)}"

    def _why_not_before(self, v: Value) -> str:
        source = v.inputs[0]
        if source not in self.mine:
            return source.why or f"{source.says} comes before it"
        others = [r.says for r in self.flow.readers[source] if r is not v]
        if others or source in self.flow.outputs:
            return f"{others[0] if others else 'another module'} reads what comes before it too"
        return next((why for (w, _), why in self.refusals.items() if w is v), "what comes before it takes in no batch norm")

    def _why_not_after(self, v: Value) -> str:
        readers = self.flow.readers[v]
        if v in self.flow.outputs or not readers:
            return "it is read from outside"
        for r in readers:
            if r not in self.mine:
                return r.why or f"{r.says} comes after it"
            if why := self.refusals.get((r, v.inputs[0])):
                return why
        return f"{readers[0].says} after it takes in no batch norm"


def _kind(v: Value) -> str:
    return v.operator.kind if v.operator else ""


def _operator(v: Value) -> Operator:
    assert v.operator is not None
    return v.operator


def _cost(m: LinearMap, multiplications: int) -> float:
    """Count for each pixel of the input: those that a stride skips cost nothing."""
    return multiplications / math.prod(m.stride)


def check(stretch: Stretch) -> float:
    """Return the relative float64 error of a stretch, on noise. Raises `ReparamError` as `agree` does."""
    x = stretch.map.noise()
    steps = stretch.steps(x)
    return agree(stretch.map(x), steps[stretch.target], list(steps.values()), stretch.target.name)


def agree(got: Tensor, wanted: Tensor, steps: list[Tensor], name: str) -> float:
    """Return the relative error of a fold's output. steps: what the original computes on the way.

    Raises `ReparamError` where it is more than rounding, which counts by the largest number on the way: 1e6 + x - 1e6 has lost
    six digits of x. Where so many are lost that a wrong fold would look alike, that is the error.
    """
    scale = max(float(wanted.abs().max()), TINY)
    error = float((got - wanted).abs().max()) / scale if wanted.shape == got.shape else math.inf
    cancels = max(float(v.abs().max()) for v in steps) / scale
    bound = max(PART_BOUND, ROUNDINGS * EPSILON * cancels)
    if error <= min(bound, BLIND):
        return error
    if bound > BLIND:
        raise ReparamError(
            f"its numbers cancel: they are up to {cancels:.0e} times as large as what is left of them, so that no fold "
            "can be proved; look at its biases and running means",
            name,
        )
    raise ReparamError(f"its folded form differs by {error:.1e} (bound {bound:.0e}); please report this", name)
