"""What the tests of the fold share: small networks, and a fold that is compared at once."""

from typing import Any

import torch
from conftest import randomize, relative_error
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.as_linear import Branches
from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.report import FoldReport
from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG

EXACT = 1e-12


def report_of(folded: nn.Module) -> FoldReport:
    assert isinstance(folded.fold_report, FoldReport)
    return folded.fold_report


def small(**arguments: Any) -> RepVGG:
    """A member of the family that folds in an instant."""
    return randomize(RepVGG(FAMILY["repvgg_micro"], **{"num_classes": 10, "width": 0.25, **arguments}))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


SMALL = (8, 3, 8, 8)


def assert_folds_exactly(model: nn.Module, shape: tuple[int, ...]) -> FoldReport:
    """Fold in float64 and compare; what was folded and left is the caller's to judge."""
    model = model.double().eval()
    folded = reparameterize(model)
    x = torch.randn(shape, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= rounding(model, x)
    return report_of(folded)


def folds(block: nn.Module, shape: tuple[int, ...]) -> None:
    """The whole block becomes one convolution that gives the same numbers."""
    block = randomize(block, (8, *shape[1:])).double()
    folded = reparameterize(block)
    assert isinstance(folded, nn.Conv2d)
    x = torch.randn(shape, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(block, x)) <= rounding(block, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Siblings(nn.Module):
    """A conv and its BN as attributes, with something to be put between or around them."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = norm or nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)).relu()
        return out


class MyConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class MyNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class MySequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x).abs()
        return out


class MyBranches(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


SUBCLASS = "is a subclass of {} and may compute something else: as_linear.register says what"
