"""rounding.py: what is allowed is rounding, and a kernel element that is off by a thousandth is none."""

import copy

import pytest
import torch
from conftest import randomize, relative_error
from members import SHALLOWER
from rounding import rounding

from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHALLOWER)
@torch.no_grad()
def test_a_kernel_element_off_by_a_thousandth_is_seen(name: str, dtype: torch.dtype) -> None:
    model = randomize(RepVGG(FAMILY[name], 10, width=0.125)).to(dtype)
    folded = reparameterize(model)
    wrong = copy.deepcopy(folded)
    weight = wrong.get_submodule("stages.1.0.block").weight
    assert isinstance(weight, torch.Tensor)
    weight.view(-1)[weight.abs().argmax()] *= 1.001
    x = torch.randn(4, 3, 64, 64, dtype=dtype)
    allowed = rounding(model, x)
    assert relative_error(folded(x), model(x)) <= allowed < relative_error(wrong(x), model(x))


def test_a_function_without_weights_is_measured_too() -> None:
    x = torch.rand(100)
    assert 0 < rounding(lambda x: x.cumsum(0), x) < 1e-4
    assert 0 < rounding(lambda x: x.cumsum(0), x.double()) < 1e-12
