"""flow.py on random computations: branches of branches, sums, concatenations, shared inputs, side readers, non-linear islands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, batch_norm
from repvgg.fold.flow import Flow, Stretch, Value
from repvgg.fold.operators import Operator, concatenated, convolved, normed, padded, picked, pooled, same, scaled, summed

EXACT = 1e-11


def off(got: Tensor, wanted: Tensor) -> float:
    """As `relative_error`; but x - x is 0, and then rounding counts against 1."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))


C = 4  # channels of most values


def conv(ins: int, outs: int, size: int = 3, stride: int = 1, groups: int = 1, padding: int | None = None) -> Operator:
    pad = size // 2 if padding is None else padding
    m = nn.Conv2d(ins, outs, size, stride, pad, groups=groups).double()
    own = LinearMap(m.weight.detach(), m.bias.detach(), (stride, stride), (pad, pad), groups=groups)  # type: ignore[union-attr]
    return convolved(lambda: own, m, m.weight.shape, groups)


def norm(channels: int = C, shift: bool = True) -> Operator:
    m = nn.BatchNorm2d(channels).double().eval()
    with torch.no_grad():
        m.weight.normal_()
        m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        if shift:
            m.bias.normal_()
            m.running_mean.normal_()  # type: ignore[union-attr]
    own = batch_norm(m.running_mean, m.running_var, m.eps, m.weight.detach(), m.bias.detach())  # type: ignore[arg-type]
    return normed(lambda: own, m, channels)


@dataclass
class Net:
    """A computation written down as values, with what its non-linear ones do."""

    values: list[Value] = field(default_factory=list)
    islands: dict[Value, Callable[..., Tensor]] = field(default_factory=dict)

    def source(self) -> Value:
        return self._enter(Value("x", says="the input"))

    def island(self, *inputs: Value, does: Callable[..., Tensor] = torch.relu, says: str = "a ReLU") -> Value:
        v = self._enter(Value(f"v{len(self.values)}", inputs, says=says))
        self.islands[v] = does
        return v

    def then(self, operator: Operator, *inputs: Value) -> Value:
        return self._enter(Value(f"v{len(self.values)}", inputs, operator, says=f"a {operator.kind}"))

    def _enter(self, v: Value) -> Value:
        self.values.append(v)
        return v

    def fold(self, *outputs: Value) -> tuple[Flow, list[Stretch]]:
        flow = Flow(list(self.values), set(outputs))
        return flow, list(flow.stretches())

    def run(self, x: Tensor, output: Value, stretches: list[Stretch] = []) -> Tensor:  # noqa: B006
        maps = {s.target: s for s in stretches}
        known: dict[Value, Tensor] = {self.values[0]: x}

        def value(v: Value) -> Tensor:
            if v not in known:
                if v in maps:
                    known[v] = maps[v].map(value(maps[v].source))
                else:
                    run = v.operator.run if v.operator else self.islands[v]
                    known[v] = run(*map(value, v.inputs))
            return known[v]

        return value(output)


@st.composite
def nets(draw: Any) -> tuple[Net, list[Value]]:
    """Values of four channels and one size, each made from some earlier ones in some way."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = Net()
    values = [net.source()]
    some = lambda: draw(st.sampled_from(values[-4:]))  # noqa: E731
    for _ in range(draw(st.integers(3, 12))):
        match draw(st.sampled_from(["conv", "conv", "norm", "norm", "add", "add", "relu", "scale", "pool", "cat", "same", "pad"])):
            case "conv":
                size, groups = draw(st.sampled_from([1, 1, 3, 3, 5])), draw(st.sampled_from([1, 1, 2, 4]))
                values.append(net.then(conv(C, C, size, groups=groups), some()))
            case "norm":
                values.append(net.then(norm(shift=draw(st.booleans())), some()))
            case "add":
                signs = draw(st.lists(st.sampled_from([1, -1]), min_size=2, max_size=3))
                values.append(net.then(summed(*signs), *(some() for _ in signs)))
            case "relu":
                values.append(net.island(some()))
            case "scale":
                values.append(net.then(scaled(torch.randn(draw(st.sampled_from([1, C]))), torch.randn(1)), some()))
            case "pool":
                values.append(net.then(pooled((3, 3), (1, 1), (1, 1)), some()))
            case "cat":
                whole = net.then(concatenated(), some(), net.then(conv(C, C, 1), some()), net.then(conv(C, C), some()))
                whole = net.then(norm(3 * C), whole) if draw(st.booleans()) else whole
                values.append(net.then(picked(draw(st.permutations(range(3 * C)))[:C]), whole))
            case "same":
                values.append(net.then(same(), some()))
            case "pad":
                values.append(net.then(conv(C, C, 3, padding=0), net.then(padded(1, 1), some())))
    return net, [values[-1], *draw(st.lists(st.sampled_from(values[1:]), max_size=2))]


def multiplications(values: list[Value]) -> int:
    return sum(v.operator.multiplications for v in values if v.operator)


@settings(max_examples=250)
@given(nets())
def test_any_computation_is_what_it_was(drawn: tuple[Net, list[Value]]) -> None:
    net, outputs = drawn
    x = torch.randn(2, C, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = [net.run(x, output) for output in outputs]
        flow, found = net.fold(*outputs)
        for output, right in zip(outputs, wanted, strict=True):
            assert off(net.run(x, output, found), right) <= EXACT
        for stretch in found:
            y = torch.randn(2, stretch.map.in_channels, 7, 6, dtype=torch.float64)
            assert off(stretch.map(y), stretch.run(y)) <= EXACT
            shared = [v for v in stretch.inside if sum(v in s.inside for s in found) == 1]
            assert stretch.map.kernel.numel() <= multiplications(stretch.inside), (shared, stretch)
    inside = {v for s in found for v in s.inside}
    assert not inside & set(flow.left)
    assert not [v for v in inside if not v.is_norm and sum(v in s.inside for s in found) > 1]


def test_the_property_test_draws_what_it_claims() -> None:
    kinds: dict[str, int] = {}

    @settings(max_examples=150, database=None)
    @given(nets())
    def count(drawn: tuple[Net, list[Value]]) -> None:
        net, outputs = drawn
        _, found = net.fold(*outputs)
        for s in found:
            sums = any(len(v.inputs) > 1 for v in s.inside)
            kinds["branches" if sums else "chain"] = kinds.get("branches" if sums else "chain", 0) + 1
            if s.source.operator is not None:
                kinds["inner"] = kinds.get("inner", 0) + 1

    count()
    assert min(kinds[k] for k in ("branches", "chain", "inner")) > 10, kinds


def block(net: Net, x: Value) -> Value:
    branches = [net.then(norm(), net.then(conv(C, C, size), x)) for size in (3, 1)]
    return net.then(summed(1, 1, 1), *branches, net.then(norm(), x))


def test_branches_of_branches_become_one() -> None:
    net = Net()
    x = net.source()
    inner = block(net, x)
    outer = net.then(summed(1, -1), net.then(scaled(torch.randn(C), torch.zeros(1)), inner), net.then(same(), x))
    flow, (stretch,) = net.fold(outer)
    assert (stretch.source, stretch.target, stretch.map.kernel_size) == (x, outer, (3, 3))
    assert not flow.left


def test_a_side_reader_ends_a_stretch() -> None:
    net = Net()
    x = net.source()
    y = net.then(conv(C, C), x)
    z = net.then(norm(), y)
    out = net.island(z, net.island(y), does=torch.add, says="an addition")
    flow, found = net.fold(out)
    assert not found
    assert flow.left == {z: "a ReLU reads what comes before it too, and an addition comes after it"}


def test_what_costs_more_stays() -> None:
    """A depthwise 3x3 beside a dense 1x1 would be a dense 3x3; and so would a dense 1x1 before a depthwise one."""
    net = Net()
    x = net.source()
    depthwise = net.then(norm(), net.then(conv(C, C, 3, groups=C), x))
    dense = net.then(norm(), net.then(conv(C, C, 1), x))
    out = net.then(summed(1, 1), depthwise, dense)
    _, found = net.fold(out)
    assert [s.target for s in found] == [depthwise, dense]
    net = Net()
    x = net.source()
    out = net.then(conv(C, C, 3, groups=C, padding=0), net.then(conv(C, C, 1), x))
    assert net.fold(out)[1] == []


@pytest.mark.parametrize(("shift", "size", "folds"), [(True, 1, True), (True, 3, False), (False, 3, True)])
def test_a_batch_norm_before_a_convolution(shift: bool, size: int, folds: bool) -> None:
    net = Net()
    x = net.source()
    relu = net.island(x)
    out = net.then(conv(C, C, size), net.then(norm(shift=shift), relu))
    flow, found = net.fold(out)
    assert len(found) == folds
    reason = "a ReLU comes before it, and a shift would cross the border of a padded 3x3"
    assert list(flow.left.values()) == [] if folds else [reason]


def test_a_batch_norm_read_by_many_convolutions_goes_into_each() -> None:
    net = Net()
    x = net.source()
    bn = net.then(norm(), x)
    outs = [net.island(net.then(conv(C, C, 1), bn)) for _ in range(3)]
    flow, found = net.fold(*outs)
    assert [s.source for s in found] == [x, x, x]
    assert not flow.left
    outs.append(net.island(bn))
    flow, found = net.fold(*outs)
    assert not found
    assert flow.left == {bn: "the input comes before it, and a ReLU comes after it"}


def test_a_batch_norm_of_a_concatenation_falls_apart() -> None:
    net = Net()
    x = net.source()
    parts = [net.then(conv(2, 2, size), net.then(picked(which), x)) for size, which in ((3, [0, 1]), (5, [2, 3]))]
    bn = net.then(norm(), net.then(concatenated(), *parts))
    out = net.island(bn)
    x0 = torch.randn(2, C, 7, 6, dtype=torch.float64)
    wanted = net.run(x0, out)
    flow, found = net.fold(out)
    assert [s.map.kernel_size for s in found] == [(3, 3), (5, 5)]
    assert not flow.left
    assert relative_error(net.run(x0, out, found), wanted) <= EXACT


def test_equal_convolutions_of_one_input_concatenated_are_one() -> None:
    net = Net()
    x = net.source()
    out = net.then(concatenated(), *(net.then(norm(n), net.then(conv(C, n), x)) for n in (2, 3, 5)))
    _, (stretch,) = net.fold(out)
    assert stretch.map.kernel.shape == (10, C, 3, 3)
