"""INT8 for the native engine: a model file that knows the ranges which NNCF found, and what the engine makes of it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from torch import nn

import repvgg
from repvgg.cli import main
from repvgg.data import open_source
from repvgg.deploy import native_int8
from repvgg.deploy.load import load_engine
from repvgg.deploy.quantize import Quantization, quantize
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.load import load, save
from repvgg.models.manifest import Preprocessing
from repvgg.models.plain import PlainNet, layer_list, set_largest_inputs
from repvgg.train.evaluate import batches

pytest.importorskip("repvgg_engine", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not all(map(find_spec, ("nncf", "openvino"))), reason="needs nncf and openvino")

GREY = Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.5,))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = randomize(repvgg.create_model("repvgg_micro", num_classes=10, in_chans=1, width=0.5, small_input=True), (16, 1, 16, 16))
    save(net, tmp_path / "m.safetensors", preprocessing=GREY)
    return tmp_path / "m.safetensors"


def ranges(file: Path) -> list[Any]:
    return [spec.get("largest_input") for spec in layer_list(load(file)) or [] if spec["op"] == "conv2d"]


def test_the_command_and_what_its_file_is_good_for(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "digits", "--limit", "60", "--json"]
    to = ["--to", "native", "--out", str(tmp_path / "q"), "--images", "20", "--keep", "1"]
    main(["quantize", str(path), *to, *data])
    figures = json.loads(capsys.readouterr().out)
    file = tmp_path / "q" / "m.int8.safetensors"
    assert {p.name for p in (tmp_path / "q").iterdir()} == {file.name, f"{file.name}.json", f"{file.name}.py"}
    found = ranges(file)
    assert found[1] is None  # it was kept
    assert all(0 < number < 1000 for i, number in enumerate(found) if i != 1)
    main(["eval", str(file), "--engine", "native", "--precision", "int8", *data])
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(figures["accuracy"]["int8"]["top1"], abs=0.001)
    deploy, images = reparameterize(load(path)), torch.randn(8, 1, 16, 16)
    engine = load_engine(file, "native", "int8", batch_size=8)
    assert 1e-4 < relative_error(engine(images), deploy(images)) < 0.2
    assert relative_error(load_engine(file, "native", batch_size=8)(images), deploy(images)) < 1e-3  # as exact as ever


@torch.no_grad()
def test_ranges_are_those_of_the_images(path: Path, tmp_path: Path) -> None:
    """As hooks see them; NNCF takes the mean over images of the largest number of each."""
    source = open_source("digits").limited(20)
    report = quantize(load(path), source, "native", tmp_path / "q", settings=Quantization(20), log=lambda line: None)
    net, seen = load(report.path), list[float]()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().amax((1, 2, 3)).mean())))
    net(torch.cat([x for x, _ in batches(source.train, GREY, 32)]))
    assert ranges(report.path) == pytest.approx(seen, rel=0.05)
    assert report.settings.bias_correction == "none"


def test_without_calibration_it_says_how(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(path), "--data", "digits", "--limit", "20", "--engine", "native", "--precision", "int8"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "needs a calibrated model: repvgg quantize MODEL --data DATA --to native --out FOLDER" in said
    assert "Traceback" not in said


def test_a_file_keeps_its_ranges(path: Path, tmp_path: Path) -> None:
    deploy = reparameterize(load(path))
    save(deploy, tmp_path / "plain.safetensors")
    count = len(layer_list(deploy) or [])
    set_largest_inputs(deploy, [0.5 + i for i in range(count)])
    save(deploy, tmp_path / "a.safetensors")
    save(reparameterize(load(tmp_path / "a.safetensors")), tmp_path / "b.safetensors")
    assert ranges(tmp_path / "b.safetensors") == [0.5 + i for i in range(count - 2)]
    bare = PlainNet(json.loads(json.dumps(layer_list(deploy))))
    set_largest_inputs(bare, [None] * count)
    assert all("largest_input" not in spec for spec in bare.layers)
    set_largest_inputs(deploy, [None] * count)
    save(deploy, tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()  # as files ever were


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300, "1", True])
def test_hostile_ranges(path: Path, tmp_path: Path, value: Any) -> None:
    deploy = reparameterize(load(path))
    set_largest_inputs(deploy, [value, *[None] * (len(layer_list(deploy) or []) - 1)])
    with pytest.raises(ValueError, match="whose largest input cannot be"):
        save(deploy, tmp_path / "hostile.safetensors")


def test_what_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="runs plain networks, and ResNet is none"):
        native_int8.check(repvgg.reparameterize(repvgg.create_model("resnet18", num_classes=3).eval()))
