"""finite.py: an output that is no number is refused, and the layer named that it comes from."""

import json
from pathlib import Path

import pytest
import torch
from conftest import randomize
from PIL import Image
from torch import Tensor, nn

import repvgg
from repvgg.cli import main
from repvgg.data import open_source
from repvgg.deploy.load import load_engine
from repvgg.models.finite import finite
from repvgg.train.evaluate import evaluate_model
from repvgg.train.loop import new_model


@pytest.fixture(scope="module")
def overflowing() -> nn.Module:
    """A deploy form in float16 whose activations do not fit."""
    model = repvgg.reparameterize(randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16)))
    with torch.no_grad():
        weight = model.get_parameter("stages.1.0.block.weight")
        weight.mul_(6e4 / weight.abs().max())
    return model.half()


def test_what_is_finite_is_returned() -> None:
    layer = nn.Linear(3, 2)
    images = torch.randn(4, 3)
    assert torch.equal(finite(layer, images), layer(images))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_the_first_layer_is_named_and_the_remedy(number: float) -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + number

    bad = Bad()
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), bad), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"first after the layer 1\.1 \(float32\); training diverged, or the file is damaged"):
        finite(network, torch.ones(1, 3))
    assert not bad._forward_hooks
    with pytest.raises(ValueError, match="try --precision fp32, or leave out --engine to learn where"):
        finite(Bad(), torch.ones(1, 3))


def test_evaluation_and_prediction_refuse(overflowing: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = r"first after the layer stages\.1\.0\.block \(float16\); float16 reaches only 65,504: --engine eager computes"
    with pytest.raises(ValueError, match=wanted):
        evaluate_model(overflowing, open_source("digits").limited(40))
    file, photo = tmp_path / "half.safetensors", tmp_path / "scan.bmp"  # of a kind that is left to PyTorch
    repvgg.save(overflowing, file)
    Image.fromarray(open_source("digits").val[0][0][0].numpy()).save(photo)
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(file), str(photo), "--json", "--device", "cpu"])
    told = capsys.readouterr()
    assert (stop.value.code, told.out) == (2, "")
    assert "stages.1.0.block" in told.err
    assert len(told.err.splitlines()) == 1
    main(["predict", str(file), str(photo), "--json", "--engine", "eager", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["engine"] == "eager"
    assert load_engine(file, "eager", log=str)(torch.zeros(1, 1, 16, 16)).isfinite().all()
