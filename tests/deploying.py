"""What the tests of engines and exported files share: a silent log, the float64 answer, and what must be installed."""

import pytest
import torch
from torch import Tensor, nn

from repvgg.fold.reparameterize import reparameterize


def silent(line: str) -> None:
    pass


def wanted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = reparameterize(model).double()(images.double())
    return logits


def has(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)
