"""ways.py: forwards that ask for values: what they demand, the ways that they go, and lists that they hand on and change."""

from collections.abc import Callable

import pytest
import torch
from asking import (
    AllOf,
    AnyOf,
    AsksAFunction,
    Asserts,
    Branches,
    CatchesAFunction,
    CatchesItself,
    CatchesTheTracer,
    Chooses,
    ComparesTuples,
    Either,
    GoesOn,
    Loops,
    NotThisTuple,
    Optional,
    Pads,
    Raises,
    RaisesElse,
    Streams,
    TakesSizesApart,
    Wrong,
)
from conftest import randomize, relative_error
from folding import EXACT, SMALL, outputs, report_of
from torch import nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize


@pytest.mark.parametrize("make", [Asserts, Raises, RaisesElse, ComparesTuples, AsksAFunction, AnyOf, AllOf, TakesSizesApart])
def test_a_forward_that_demands_something_folds(make: Callable[[], nn.Module]) -> None:
    model = randomize(make(), SMALL).double()
    folded = reparameterize(model)
    assert report_of(folded).pairs == [("conv", "norm")]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


@pytest.mark.parametrize("make", [Either, GoesOn, NotThisTuple, CatchesItself, CatchesAFunction, CatchesTheTracer])
def test_a_forward_that_goes_two_ways_stays_as_it_is(make: Callable[[], nn.Module]) -> None:
    model = randomize(make(), SMALL).double()
    folded = reparameterize(model)
    assert report_of(folded).left == {"norm": "its network goes 2 ways, which its input decides"}
    for size in (8, 6):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert torch.equal(outputs(folded, x), outputs(model, x))


def test_what_is_called_on_either_way_folds() -> None:
    model = randomize(Pads(), SMALL).double()
    folded = reparameterize(model)
    assert sorted(report_of(folded).pairs) == [("even.0", "even.1"), ("odd.0", "odd.1")]
    assert not report_of(folded).left
    for size in (8, 7):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_too_many_ways_are_none() -> None:
    report = report_of(reparameterize(randomize(Loops(), SMALL)))
    assert report.left.keys() == {"even.1", "odd.1"}
    assert all(why.startswith("Loops cannot be traced (symbolically traced") for why in report.left.values())


def test_lists_that_are_handed_on_and_changed_are_followed() -> None:
    """As HRNet's and VoVNet's."""
    model = randomize(Streams(), SMALL).double()
    folded = reparameterize(model)
    assert not report_of(folded).left
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_a_forward_that_is_written_anew_demands_it_still() -> None:
    model = randomize(Branches(), SMALL).double()
    folded = reparameterize(model)
    assert len([m for m in folded.modules() if isinstance(m, nn.Conv2d)]) == 1
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT
    for network in (model, folded):
        with pytest.raises(AssertionError):
            network(torch.randn(2, 3, 8, 2, dtype=torch.float64))


def test_an_example_that_it_would_refuse_is_refused() -> None:
    with pytest.raises(AssertionError):
        reparameterize(Wrong().eval(), torch.randn(SMALL))


def test_what_a_strangers_class_returns_is_left_alone() -> None:
    """As transformers' models: an input with a default, outputs of a class of their own."""
    model = randomize(Optional(), SMALL).double()
    folded = reparameterize(model)
    report = report_of(folded)
    assert report.left.keys() == {"norm", "inner.norm"}
    assert "a class of its own for what it returns (Output)" in report.left["inner.norm"]
    assert sorted(report.pairs) == [("inner.layer.0", "inner.layer.1"), ("inner.words.conv2d", "inner.words.norm")]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_a_method_of_its_own_that_a_module_has_for_its_forward() -> None:
    model = randomize(nn.Sequential(Chooses(), nn.ReLU()), SMALL).double()
    folded = reparameterize(model)
    assert report_of(folded).pairs == [("0.conv", "0.norm")]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT
    model[0].forward = Chooses().fast  # another module's
    with pytest.raises(ReparamError, match="a forward of its own in place"):
        reparameterize(model)
