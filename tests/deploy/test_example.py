"""deploy/example.py: the programs beside exported files give the labels that repvgg predict gives."""

import copy
import os
import runpy
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from torch import nn

from repvgg.deploy.example import preparation, program
from repvgg.deploy.export import Shape, export
from repvgg.deploy.formats import FORMATS
from repvgg.models import zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.predict.labels import predict

P = Preprocessing((3, 32, 40), 48, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = zoo.create_model("repvgg_micro", num_classes=3, width=0.25)
    classes = ["cat", "a dog", "owl"]
    return zoo.remember(randomize(model, (16, 3, 32, 32)), Manifest(zoo.manifest_of(model).arch, classes=classes, preprocessing=P))


@pytest.fixture(scope="module", params=["RGB", "RGBA"])
def photo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, len(request.param)), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 71)).save(path)
    return path


@pytest.mark.parametrize(
    ("to", "shape"),
    [
        ("onnx", Shape()),
        pytest.param("onnx", Shape(batch_size=2, pixels=True), marks=pytest.mark.slow),
        ("openvino", Shape()),
        ("ncnn", Shape()),
        pytest.param("mnn", Shape(), marks=pytest.mark.slow),
        ("pt2", Shape()),
        pytest.param("aotinductor", Shape(), marks=pytest.mark.slow),
    ],
)
def test_the_program_runs_the_file(
    to: str,
    shape: Shape,
    model: nn.Module,
    photo: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_spec({"mnn": "MNN", "pt2": "torch", "aotinductor": "torch", "onnx": "onnxruntime"}.get(to, to)) is None:
        pytest.skip(f"{to} is not installed")
    if to == "openvino" and os.environ.get("ONEDNN_MAX_CPU_ISA") == "SSE41":
        pytest.skip("OpenVINO chooses kernels by the processor, which this oneDNN may not run")
    path = export(model, to, tmp_path, "net", shape, log=lambda line: None)
    (wanted,) = predict(model, [str(photo)])
    program = tmp_path / f"net{FORMATS[to].suffix}.py"
    assert program == path.with_name(path.name + ".py")
    monkeypatch.setattr(sys, "argv", [str(program), str(photo)])
    capfd.readouterr()
    runpy.run_path(str(program), run_name="__main__")
    lines = [line.rpartition("  ") for line in capfd.readouterr().out.splitlines() if line.endswith("%")]
    assert [name for name, _, _ in lines] == [name for name, _ in wanted.labels]
    for (_, _, shown), (_, probability) in zip(lines, wanted.labels, strict=True):
        assert abs(float(shown[:-1]) / 100 - probability) < 0.005  # Pillow rounds between its two passes, torchvision as well


def test_a_probability_tells_a_wrong_preparation(model: nn.Module, photo: Path) -> None:
    """By more than the test above allows."""
    (wanted,) = predict(model, [str(photo)])
    for wrong in (replace(P, mean=(0.0,) * 3), replace(P, std=(0.4,) * 3), replace(P, resize=60)):
        other = zoo.remember(copy.deepcopy(model), replace(zoo.manifest_of(model), preprocessing=wrong))
        (found,) = predict(other, [str(photo)])
        assert max(abs(dict(found.labels)[name] - p) for name, p in wanted.labels) > 0.01, wrong


def test_preparation_in_words() -> None:
    words = preparation(P, pixels=False, resized=False)
    assert words[:4] == [
        "decode as RGB, as a viewer would show it",
        "resize the short side to 48 pixels, bicubic, antialiased",
        "crop the centre, 40 x 32",
        "divide by 255",
    ]
    assert preparation(Preprocessing((1, 8, 8), 8, mean=(0.0,), std=(1.0,)), True, False)[0].startswith("decode as grey")


def test_no_photo_has_four_channels() -> None:
    for channels in (1, 3, 4):
        known = Preprocessing((channels, 32, 32), 32, mean=(0.5,) * channels, std=(0.2,) * channels)
        code = program("a.onnx", "onnx", Manifest({"in_chans": channels}, preprocessing=known), None, pixels=False, resized=False)
        assert (code is None) == (channels == 4)
