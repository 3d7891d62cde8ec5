"""What tests of engines and exported files share: a network with random statistics, and images for it."""

import pytest
import torch
from conftest import randomize
from torch import Tensor, nn

from repvgg.data import open_source
from repvgg.train.loop import new_model


@pytest.fixture(autouse=True)
def _little_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine chooses by its first guesses: how it measures is a matter of its own tests."""
    try:
        from repvgg_engine import speed, tune
    except ImportError:
        return
    monkeypatch.setattr(speed, "SECONDS", 0)
    monkeypatch.setattr(tune, "SECONDS", 0)
    monkeypatch.setattr(tune, "SECONDS_INT8", 0.05)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(3))
