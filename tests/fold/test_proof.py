"""proof.py: right folds are equal, wrong ones are not, and what cannot be judged is said to be so."""

import math
from typing import Any

import pytest
import torch
from folding import small
from rounding import REPORTED
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize


class Nearly(nn.Module):
    """An output that hardly depends on the input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(10, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return 1000 + 0.02 * x.mean((1, 2, 3)).unsqueeze(1) * self.scale


def test_trap_07_a_constant_output_does_not_hide_a_wrong_fold() -> None:
    same, wrong = verify(Nearly(1).eval(), Nearly(1).eval(), (3, 8, 8)), verify(Nearly(1).eval(), Nearly(2).eval(), (3, 8, 8))
    assert same.ok
    assert wrong.max_rel_err < 1e-5
    assert wrong.error.of_deviation > 1
    assert not wrong.ok
    assert str(wrong).startswith("NOT EQUAL in float32: relative error ")


def test_trap_07_a_small_mistake_is_found() -> None:
    model = small()
    folded = reparameterize(model)
    good = verify(model, folded, (3, 32, 32))
    assert good.ok
    assert good.max_rel_err <= REPORTED
    assert str(good).startswith("equal in float32: relative error ")
    with torch.no_grad():
        folded.get_submodule("stages.1.0.block").weight.mul_(1.001)  # type: ignore[operator]
    bad = verify(model, folded, (3, 32, 32))
    assert not bad.ok
    assert bad.max_rel_err > bad.bound


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trap_07_what_is_not_finite_is_never_equal(value: float) -> None:
    model = small()
    broken = reparameterize(model)
    with torch.no_grad():
        broken.get_submodule("head").bias[3] = value  # type: ignore[index, operator]
    assert not verify(model, broken, (3, 32, 32)).ok
    assert not verify(broken, broken, (3, 32, 32)).ok
    huge = nn.Conv2d(3, 4, 2).eval().half()
    nn.init.constant_(huge.weight, 6e4)
    assert not verify(huge, huge, (3, 2, 2)).ok  # both overflow: nothing is proved


def test_verify_compares_trees_of_tensors() -> None:
    class Features(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Any]:
            features: list[Tensor] = self.model.forward_intermediates(x)  # type: ignore[operator]
            return {"features": features, "classes": features[-1].mean((2, 3)).argmax(1)}

    model = small()
    folded = reparameterize(model)
    assert verify(Features(model).eval(), Features(folded).eval(), (3, 32, 32)).ok
    with pytest.raises(ReparamError, match="outputs differ in number or shape"):
        verify(Features(model).eval(), folded, (3, 32, 32))
    with pytest.raises(ReparamError, match="no tensors of floating point"):
        verify(nn.Sequential(model, ArgMax()).eval(), nn.Sequential(folded, ArgMax()).eval(), (3, 32, 32))
    with pytest.raises(ValueError, match="images is 1"):
        verify(model, folded, (3, 32, 32), images=1)


class ArgMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)
