"""conditions.py: what forwards demand of their inputs, and do else, and that the folded network demands it too."""

from collections.abc import Callable

import pytest
import torch
from conftest import randomize, relative_error
from demanding import (
    AnyOf,
    AsksAFunction,
    Asserts,
    Branches,
    CatchesAFunction,
    CatchesItself,
    CatchesTheTracer,
    ComparesTuples,
    Either,
    GoesOn,
    NotThisTuple,
    Raises,
    RaisesElse,
    TakesSizesApart,
    Wrong,
)
from folding import EXACT, SMALL, outputs, report_of
from torch import nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize


@pytest.mark.parametrize("make", [Asserts, Raises, RaisesElse, ComparesTuples, AsksAFunction, TakesSizesApart])
def test_a_forward_that_demands_something_folds(make: Callable[[], nn.Module]) -> None:
    model = randomize(make(), SMALL).double()
    folded = reparameterize(model)
    assert report_of(folded).pairs == [("conv", "norm")]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


@pytest.mark.parametrize("make", [Either, GoesOn, AnyOf, NotThisTuple, CatchesItself, CatchesAFunction, CatchesTheTracer])
def test_a_forward_that_may_go_two_ways_is_left(make: Callable[[], nn.Module]) -> None:
    model = randomize(make(), SMALL).double()
    folded = reparameterize(model)
    why = f"{type(model).__name__} cannot be traced (symbolically traced variables cannot be used as inputs to control flow)"
    assert report_of(folded).left == {"norm": why}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(outputs(folded, x), outputs(model, x))


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
    with pytest.raises((ReparamError, AssertionError)):
        reparameterize(Wrong().eval(), torch.randn(SMALL))
