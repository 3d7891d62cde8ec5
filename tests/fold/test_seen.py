"""ways.py, seen.py: forwards that leave something for their next call, and lists that are taken apart."""

from collections.abc import Callable

import pytest
import torch
from conftest import randomize, relative_error
from folding import EXACT, SMALL, outputs, report_of
from remembering import AddsTheLast, Caches, Counts, Grid, Grows, KeepsAModule, OpensAWay, Pyramid, ReadsAWord, SharesAList
from torch import nn

from repvgg.fold.reparameterize import reparameterize


def in_turn(model: nn.Module, folded: nn.Module) -> float:
    """Return the largest relative error over calls with images of changing size: what one call leaves, the next one finds."""
    errors = []
    for size in (8, 6, 8, 8, 6):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        errors.append(relative_error(outputs(folded, x), outputs(model, x)))
    return max(errors)


def test_what_is_called_alike_in_each_state_folds() -> None:
    """As in YOLO's heads, which make a grid anew when the size of the image changes."""
    model = randomize(Grid(), SMALL).double()
    model.size, model.grid = None, torch.empty(0)  # as before its first call
    folded = reparameterize(model)
    assert report_of(folded).pairs == [("boxes.0.0", "boxes.0.1"), ("boxes.1.0", "boxes.1.1")]
    assert not report_of(folded).left
    assert in_turn(model, folded) <= EXACT


def test_what_a_dictionary_keeps_is_followed() -> None:
    model = randomize(Caches(), SMALL).double()
    model.cache.clear()
    folded = reparameterize(model)
    assert not report_of(folded).left
    assert not folded.cache
    assert in_turn(model, folded) <= EXACT


@pytest.mark.parametrize("make", [OpensAWay, AddsTheLast, ReadsAWord, Grows])
def test_a_state_that_opens_another_way_is_gone_through(make: Callable[[], nn.Module]) -> None:
    model = randomize(make(), SMALL).double()
    folded = reparameterize(model)
    assert report_of(folded).left.keys() == {"pair.1"}
    assert in_turn(model, folded) == 0


def test_a_forward_that_keeps_a_module_is_left() -> None:
    model = randomize(KeepsAModule(), SMALL).double()
    model.layers.clear()
    assert "(it keeps a module for its next call)" in report_of(reparameterize(model)).left["pair.1"]


def test_a_forward_that_counts_its_calls_still_does() -> None:
    model = randomize(Counts(), SMALL).double()
    model.calls = 0
    folded = reparameterize(model)
    assert in_turn(model, folded) <= EXACT
    assert model.calls == folded.calls == 5
    assert len([m for m in folded.modules() if isinstance(m, nn.Conv2d)]) == 2  # one, if its forward were written anew


def test_a_tensor_that_two_modules_share_through_a_list_is_seen() -> None:
    model = randomize(SharesAList(), SMALL).double()
    model.other.weights = [*model.pair[0].parameters()]
    folded = reparameterize(model)
    assert "other cannot be traced (it uses a tensor of a module that it finds in another place)" in report_of(folded).left.values()


def test_a_list_that_is_added_to_is_followed() -> None:
    """As a U-Net of segmentation-models-pytorch on a backbone of timm's."""
    model = randomize(Pyramid(), SMALL).double()
    folded = reparameterize(model)
    assert not report_of(folded).left
    assert in_turn(model, folded) <= EXACT
