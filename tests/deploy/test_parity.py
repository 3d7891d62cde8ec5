"""parity.py: what an engine computes is judged by how far it is off, and by what the answers differ by from image to image."""

import math

import torch
from torch import Tensor

from repvgg.deploy.parity import Parity, Reference
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
