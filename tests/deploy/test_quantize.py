"""quantize.py: what INT8 costs is measured, and what helps against it helps."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import randomize, relative_error
from torch import nn

from repvgg.cli import main
from repvgg.data import Decoded, Source, open_source
from repvgg.deploy import quantize as quantizing
from repvgg.deploy.engines import Signature
from repvgg.deploy.load import load_engine
from repvgg.deploy.qat import RoundedConv
from repvgg.deploy.quantize import Quantization, QuantizationReport, qat_recipe, quantize
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.models.manifest import Manifest, Preprocessing

needed = ("nncf", "openvino", "onnxruntime")
pytestmark = pytest.mark.skipif(not all(map(find_spec, needed)), reason=f"needs {', '.join(needed)}")

P = Preprocessing((3, 16, 16), 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = ["a", "b", "c"]


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = zoo.create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True)
    net = randomize(net, (32, 3, 16, 16))
    return reparameterize(zoo.remember(net, Manifest(zoo.manifest_of(net).arch, classes=CLASSES, preprocessing=P)))


@pytest.fixture(scope="module")
def source(model: nn.Module) -> Source:
    """Images that the model labels itself, so that its own accuracy is 100%."""
    pixels = torch.randint(0, 256, (120, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model((pixels / 255 - 0.5) / 0.25).argmax(1).tolist()
    images = Decoded(pixels, labels)
    return Source("self-labelled", images, images, CLASSES, P, recipe="demo")


def mean_snr(report: QuantizationReport) -> float:
    return sum(layer.snr for layer in report.layers) / len(report.layers)


@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])  # the command writes and opens the other
def test_int8_is_measured_and_its_file_runs(to: str, model: nn.Module, source: Source, tmp_path: Path) -> None:
    report = quantize(model, source, to, tmp_path, "net", Quantization(images=40), log=silent)
    assert report.before.top1 == 1
    assert report.before.images == report.after.images == 120
    assert report.drop < 0.2
    assert len(report.layers) == 10
    assert report.layers[0].name == "stem.block"
    assert all(15 < layer.snr < 60 for layer in report.layers)
    assert {p.suffix for p in tmp_path.iterdir()} == (
        {".xml", ".bin", ".json", ".py"} if to == "openvino" else {".onnx", ".json", ".py"}
    )
    kept = json.loads((tmp_path / f"{report.path.name}.json").read_text())
    assert kept["accuracy"]["int8"]["top1"] == report.after.top1
    runner = load_engine(tmp_path, batch_size=8)
    assert runner.manifest is not None
    assert runner.manifest.classes == CLASSES
    pixels = torch.stack([source.val[i][0] for i in range(120)])
    same = runner((pixels / 255 - 0.5) / 0.25).argmax(1) == torch.tensor([source.val[i][1] for i in range(120)])
    assert float(same.float().mean()) == pytest.approx(report.after.top1, abs=0.02)


def uneven(model: nn.Module, pairs: int) -> nn.Module:
    """The same function, with channels of very different ranges between so many pairs of layers of the last stage but one."""
    deploy = zoo.remember(reparameterize(model), zoo.manifest_of(model))
    with torch.no_grad():
        for i in range(pairs):
            first, second = (deploy.get_submodule(f"stages.2.{j}.block") for j in (i, i + 1))
            assert isinstance(first, nn.Conv2d)
            assert isinstance(second, nn.Conv2d)
            assert first.bias is not None
            gain = torch.logspace(-2, 2, first.out_channels)
            first.weight.mul_(gain.view(-1, 1, 1, 1))
            first.bias.mul_(gain)
            second.weight.div_(gain.view(1, -1, 1, 1))
    return deploy


def test_trap_13_channels_of_very_different_ranges_collapse_unless_equalised(
    model: nn.Module, source: Source, tmp_path: Path
) -> None:
    careless, even = (
        quantize(uneven(model, 3), source, "openvino", tmp_path / str(flag), settings=Quantization(40, equalise=flag), log=silent)
        for flag in (False, True)
    )
    assert careless.before.top1 == even.before.top1 == 1  # the same function
    assert even.after.top1 > careless.after.top1 + 0.1
    assert mean_snr(even) > mean_snr(careless) + 5


def test_biases_are_corrected_in_the_networks_of_openvino_too(model: nn.Module, tmp_path: Path) -> None:
    """NNCF looks for an Add of a constant, and a bias read from ONNX is a Reshape of one."""
    from repvgg.deploy.engines import openvino
    from repvgg.deploy.engines.graph import to_onnx

    openvino.save(openvino.read(to_onnx(model, Signature(P.input_size))), tmp_path / "plain.xml", "")
    images = torch.randn(16, *P.input_size)

    def biases(correction: Literal["none", "fast", "full"]) -> list[float]:
        network = quantizing._quantised(openvino, tmp_path / "plain.xml", images, [], Quantization(bias_correction=correction))
        added = [op.input_value(1).get_node() for op in network.get_ordered_ops() if op.get_type_name() == "Add"]
        return [float(node.get_data().sum()) for node in added[:-1]]  # the classifier's is another kind of layer

    none, fast, full = biases("none"), biases("fast"), biases("full")
    assert len(none) == 10
    assert sum(a != b for a, b in zip(none, fast, strict=True)) > 5
    assert sum(a != b for a, b in zip(fast, full, strict=True)) > 5


def test_layers_are_left_in_float_by_number(model: nn.Module, source: Source, tmp_path: Path) -> None:
    report = quantize(model, source, "openvino", tmp_path, settings=Quantization(40, keep=(0, -1)), log=silent)
    assert report.kept == [0, 10]
    assert report.layers[0].snr > 60


def test_layers_are_left_in_float_until_the_drop_is_kept(
    model: nn.Module, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, chosen, worst = list[str](), list[int](), quantizing._worst

    def spy(*given: Any) -> int:
        chosen.append(worst(*given))
        return chosen[-1]

    monkeypatch.setattr(quantizing, "_worst", spy)
    strict = quantize(uneven(model, 1), source, "openvino", tmp_path, settings=Quantization(40, max_drop=0.05), log=said.append)
    assert strict.drop <= 0.05
    assert strict.kept == sorted(chosen)
    assert chosen[0] in (5, 6)  # the two between which ranges were spoilt
    assert sum(line.startswith("quantising") for line in said) == len(strict.kept) + 1


@pytest.mark.slow  # test_qat.py: test_training_learns_to_live_with_the_rounding proves the training
def test_training_with_the_rounding_in_it(model: nn.Module, source: Source, tmp_path: Path) -> None:
    settings = Quantization(40, qat_epochs=1, qat_lr=1e-4)
    report = quantize(model, source, "onnx", tmp_path, "net", settings, log=silent)
    assert report.before.top1 == 1  # of what it was given
    assert report.drop < 0.2
    trained = load(tmp_path / "net.qat.safetensors")
    manifest = zoo.manifest_of(trained)
    assert (manifest.form, manifest.classes, manifest.preprocessing) == ("deploy", CLASSES, P)
    assert all(type(m) is not RoundedConv for m in trained.modules())
    images = torch.randn(8, 3, 16, 16)
    moved = relative_error(trained(images), model(images))
    assert 1e-6 < moved < 0.3
    runner = load_engine(tmp_path, batch_size=8)  # the INT8 file is of the trained network
    assert relative_error(runner(images), trained(images)) < 0.1


def test_the_command_and_what_it_wrote_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = zoo.create_model("repvgg_micro", num_classes=10, in_chans=1, width=0.25, small_input=True)
    grey = Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.5,))
    save(randomize(net, (16, 1, 16, 16)), tmp_path / "m.safetensors", preprocessing=grey)
    data = ["--data", "digits", "--limit", "50", "--json"]
    main(["quantize", str(tmp_path / "m.safetensors"), "--to", "openvino", "--out", str(tmp_path / "q"), "--images", "20", *data])
    figures = json.loads(capsys.readouterr().out)
    main(["eval", str(tmp_path / "q"), *data])
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(figures["accuracy"]["int8"]["top1"], abs=0.021)
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(tmp_path / "m.safetensors"), "--to", "onnx", "--out", str(tmp_path / "m.safetensors"), *data])
    assert stopped.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_nothing_is_left_in_a_folder_that_cannot_be_written(model: nn.Module, source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        quantize(model, source, "openvino", tmp_path / "file", settings=Quantization(8), log=silent)


def test_what_is_refused(model: nn.Module, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no INT8 for 'ncnn': there are openvino, onnx"):
        quantize(model, source, "ncnn", tmp_path)
    with pytest.raises(ValueError, match="the model knows 3 classes, self-labelled has 2"):
        quantize(model, replace(source, classes=["a", "b"]), "onnx", tmp_path)
    grey = replace(source, preprocessing=Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ValueError, match="the model takes images of 3 channels, those of self-labelled have 1"):
        quantize(model, grey, "onnx", tmp_path)
    with pytest.raises(ValueError, match="--keep 11: there are 11 layers"):
        quantize(model, source, "onnx", tmp_path, settings=Quantization(8, keep=(11,)), log=silent)
    with pytest.raises(ValueError, match="has masks, and what INT8 costs is measured on labels"):
        quantize(model, replace(source, masks=True), "onnx", tmp_path)
    for wrong, reason in (
        ({"qat_epochs": -1}, "--qat-epochs is not negative"),
        ({"images": 0}, "--images"),
        ({"max_drop": 2.0}, "--max-drop 2.0: a fr"),
    ):
        with pytest.raises(ValueError, match=reason):
            Quantization(**wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantising needs nncf: pip install nncf"):
        quantize(model, source, "onnx", tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_with_rounding_is_gentle_whatever_the_recipe_of_the_data() -> None:
    """The network is trained already: nothing moves at rates of their own, and images have their size from the start."""
    recipe = qat_recipe(replace(open_source("digits"), recipe="cifar"))
    assert (recipe.optimizer, recipe.ema, recipe.small_first, recipe.bn_bias_lr, recipe.freeze_bn) == ("sgd", 0, 0, 1, True)
