"""parity.py: what an engine computes is judged by how far it is off, and by what the answers differ by from image to image."""

import math

import torch
from torch import Tensor

from repvgg.deploy.parity import Parity, Reference, clear_ones
from repvgg.deploy.parity import compare as compare_with
from repvgg.fold.rounding import Error


def compare(got: Tensor, exact: Tensor) -> Parity:
    own = Error(2**-24, 2**-24 * float(exact.abs().max() / exact.std(0).mean().clamp(min=1e-30)))
    return compare_with(got, Reference(exact, own, "fp32"))


def wanted() -> Tensor:
    return torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_same_is_the_same_and_another_is_not() -> None:
    assert compare(wanted().float(), wanted()).ok
    assert not compare(wanted().flip(0).float(), wanted()).ok
    assert not compare(wanted().float() * math.nan, wanted()).ok


def test_a_constant_answer_cannot_hide_behind_a_large_one() -> None:
    far = wanted() + 1e6
    assert not compare(far.mean(0, keepdim=True).expand(8, 5).float(), far).ok


def test_a_network_that_is_constant_is_judged_by_its_error_alone() -> None:
    constant = wanted()[:1].expand(8, 5)
    assert compare(constant.float(), constant).ok
    assert not compare(constant.float() + 0.1, constant).ok


def test_clear_predictions_lead_by_their_probability_whatever_the_error() -> None:
    """Else a label that an engine changes would never count as clear."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.15], [1.0, 0.0]], dtype=torch.float64)
    assert clear_ones(logits).tolist() == [True, False, True]
    found = compare(logits[:, [1, 0]].float(), logits)
    assert (found.same, found.clear, found.differ_where_clear) == (0, 2, 2)
    assert "(2 of the others clear)" in str(found)
    assert not clear_ones(torch.zeros(2, 1)).any()
