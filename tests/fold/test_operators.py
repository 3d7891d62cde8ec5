"""operators.py: every n-th row and column is a linear map too, in a PyTorch forward and in an ONNX file."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import randomize
from rounding import rounding
from torch import Tensor, nn

import repvgg
from repvgg.fold.algebra import identity
from repvgg.fold.onnx import fold_onnx
from repvgg.fold.operators import strided
from repvgg.fold.torch_operators import of_flat, of_module


class Subsampled(nn.Module):
    """A block of stride 2 whose 1x1 branch reads only the pixels that it needs."""

    def __init__(self, whole: bool = True) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.point, self.first = nn.Conv2d(4, 6, 1), slice(None if whole else 1, None, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.point(x[..., self.first, ::2])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (3, 1), (1, 4)])
def test_strided_against_slices(rows: int, columns: int) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    operator = strided(rows, columns)
    assert torch.equal(operator.run(x), x[:, :, ::rows, ::columns])
    assert torch.equal(operator.apply(identity(3))(x), x[:, :, ::rows, ::columns])


@torch.no_grad()
def test_a_branch_that_drops_pixels_first_folds() -> None:
    model = randomize(Subsampled(), (2, 4, 8, 8)).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    deploy = repvgg.reparameterize(model, x)
    assert [type(m) for m in deploy.modules()] == [nn.Conv2d]
    assert float((deploy(x) - model(x)).abs().max() / model(x).abs().max()) <= rounding(model, x)


def test_pixels_from_the_second_on_are_left() -> None:
    model = randomize(Subsampled(whole=False), (2, 4, 8, 8))
    assert sum(isinstance(m, nn.Conv2d) for m in repvgg.reparameterize(model).modules()) == 2


@pytest.mark.filterwarnings("ignore")
def test_our_own_training_form_as_onnx(tmp_path: Path) -> None:
    """Our 1x1 convolutions of stride 2 drop the pixels first, so the exported file holds slices."""
    model = randomize(repvgg.create_model("repvgg_micro", num_classes=5, width=0.25), (2, 3, 32, 32))
    preserve = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False, "dynamo": False}
    torch.onnx.export(model, (torch.randn(1, 3, 32, 32),), str(tmp_path / "training.onnx"), **preserve)  # type: ignore[arg-type]
    fold_onnx(tmp_path / "training.onnx", tmp_path / "folded.onnx")
    found = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in repvgg.reparameterize(model).modules())
    assert (found.count("Conv"), found.count("BatchNormalization"), found.count("Slice")) == (convolutions, 0, 0)


def linear_module(kind: str) -> Any:
    kinds = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(3), "linear": nn.Linear(3, 4), "flat": nn.BatchNorm1d(3)}
    made = kinds[kind].eval()
    return of_flat(made) if kind in ("linear", "flat") else of_module(made, "it")


@pytest.mark.parametrize("kind", ["conv", "norm", "linear", "flat"])
def test_an_operator_is_proved_where_its_input_is(kind: str) -> None:
    """A network may lie on two devices; the meta device stands for the second."""
    x = torch.empty(2, 3, *((5, 5) if kind in ("conv", "norm") else (1, 1)), dtype=torch.float64, device="meta")
    assert linear_module(kind).run(x).is_meta
