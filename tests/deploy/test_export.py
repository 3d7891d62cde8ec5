"""export.py: every file computes what PyTorch does in float64, or is not there."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, relative_error
from hypothesis import given
from hypothesis import strategies as st
from roads import make_camvid
from rounding import ENGINES, rounding
from torch import Tensor, nn
from torchvision.transforms import v2

from repvgg.deploy import engines
from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.export import FromPixels, Shape, export, real_images, resize_and_crop
from repvgg.deploy.formats import FORMATS, report_of
from repvgg.disk import FileError
from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import FAMILY

CLASSES = ["cat", "dog", "owl"]
QUICK = [name for name in FORMATS if name != "aotinductor"]


def small(name: str = "repvgg_micro") -> nn.Module:
    model = zoo.create_model(name, num_classes=3, width=0.125, small_input=True)
    return zoo.remember(randomize(model, (16, 3, 32, 32)), Manifest(zoo.manifest_of(model).arch, classes=CLASSES, preprocessing=P))


P = Preprocessing((3, 32, 32), 40)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small()


def silent(line: str) -> None:
    pass


def needs(name: str) -> None:
    for package in engines.ENGINES[FORMATS[name].engine].packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def opened(path: Path, to: str, images: Tensor) -> Engine:
    options = Options(tuple(images.shape[1:]), len(images))  # type: ignore[arg-type]
    return engines.runtime(FORMATS[to].module).open_file(path, options)


def exact(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network.double()(images)
    return logits


@pytest.mark.parametrize("to", [*QUICK, pytest.param("aotinductor", marks=pytest.mark.slow)])
def test_a_file_computes_what_the_training_form_does(to: str, model: nn.Module, tmp_path: Path) -> None:
    needs(to)
    said: list[str] = []
    path = export(model, to, tmp_path, "net", log=said.append)
    assert path == tmp_path / f"net{FORMATS[to].suffix}"
    images = torch.randn(3, 3, 32, 32)
    wanted = exact(reparameterize(model), images.double())
    assert relative_error(opened(path, to, images)(images), wanted) <= rounding(model, images, times=ENGINES)
    report = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert (report["input"]["name"], report["output"]["name"], report["input"]["dtype"]) == ("images", "logits", "float32")
    assert report["input"]["shape"] == [1 if to == "ncnn" else None, 3, 32, 32]
    assert report["input"]["preparation"][0].startswith("decode as RGB")
    assert "divide by 255" in report["input"]["preparation"]
    assert report["labels"] == CLASSES
    assert report["manifest"]["classes"] == CLASSES
    assert report["parity"]["error"]["relative"] < report["parity"]["bound"]["relative"]
    assert len(said) == 1
    assert said[0].startswith(f"{path}: relative error")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    if to in ("onnx", "openvino"):  # the formats that have a place for it hold the manifest too
        manifest = Manifest.from_json(engines.runtime(FORMATS[to].module).metadata(path) or "")
        assert (manifest.classes, manifest.preprocessing, manifest.form) == (CLASSES, P, "deploy")


@pytest.mark.parametrize("to", ["onnx", *(pytest.param(to, marks=pytest.mark.slow) for to in QUICK if to != "onnx")])
def test_images_of_any_size(to: str, model: nn.Module, tmp_path: Path) -> None:
    needs(to)
    path = export(model, to, tmp_path, shape=Shape(any_size=True), log=silent)
    images = torch.randn(2, 3, 56, 40)
    allowed = rounding(model, images, times=ENGINES)
    assert relative_error(opened(path, to, images)(images), exact(reparameterize(model), images.double())) <= allowed


@pytest.mark.parametrize("to", ["onnx", "pt2", pytest.param("openvino", marks=pytest.mark.slow)])  # which reads what onnx does
def test_pixels_in_logits_out(to: str, model: nn.Module, tmp_path: Path) -> None:
    needs(to)
    pixels = torch.randint(0, 256, (2, 3, 60, 50), dtype=torch.uint8)
    path = export(model, to, tmp_path, shape=Shape(batch_size=2, image_size=(60, 50)), log=silent)
    resized = v2.functional.center_crop(v2.functional.resize(pixels.double(), [40], antialias=True), [32, 32])
    images = v2.functional.normalize(resized / 255, list(P.mean), list(P.std))
    wanted, allowed = exact(reparameterize(model), images), rounding(model, images.float(), times=ENGINES)
    assert relative_error(opened(path, to, pixels)(pixels), wanted) <= allowed
    report = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert (report["input"]["dtype"], report["input"]["shape"]) == ("uint8", [2, 3, 60, 50])
    assert report["input"]["preparation"][1] == "make it 50 x 60 pixels"
    assert report["manifest"]["preprocessing"]["resize"] == 50


@given(st.integers(32, 90), st.integers(32, 90), st.sampled_from(["bilinear", "bicubic", "nearest"]), st.integers(0))
def test_resizing_as_two_products(height: int, width: int, mode: str, seed: int) -> None:
    p = Preprocessing((3, 20, 24), 28, mode)
    image = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (1, 3, height, width)))
    resized = v2.functional.resize(image, [28], v2.InterpolationMode(mode), antialias=True)
    rows, columns = resize_and_crop((height, width), p)
    torch.testing.assert_close(rows @ image @ columns, v2.functional.center_crop(resized, [20, 24]), rtol=1e-9, atol=1e-9)


def test_bicubic_overshoot_is_cut_off_as_in_predict() -> None:
    """Beside a sharp edge it goes beyond black and white."""
    p = Preprocessing((1, 20, 20), 20, "bicubic", (0.0,), (1.0,))
    pixels = torch.zeros(1, 1, 50, 50, dtype=torch.uint8)
    pixels[..., 20:33] = 255
    graph = FromPixels(nn.Conv2d(1, 1, 1, bias=False), p, (50, 50))
    graph.network = nn.Identity()
    shown = v2.functional.resize(pixels, [20], v2.InterpolationMode.BICUBIC, antialias=True).float() / 255
    assert (graph(pixels) - shown).abs().max() < 1.01 / 255
    graph.overshoots = False
    assert graph(pixels).max() > 1.01


def test_so_many_images_that_there_are_none(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="--images 0: at least 1"):
        real_images(model, "digits", 0)


def test_an_image_that_is_too_small_once_resized() -> None:
    with pytest.raises(ValueError, match="--image-size: 64 x 64, resized to 28, is too small to crop"):
        resize_and_crop((64, 64), Preprocessing((3, 32, 32), 28))


def test_normalisation_in_the_graph_is_that_of_predict(model: nn.Module) -> None:
    from repvgg.data.transforms import normalise

    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        images = normalise(pixels, P)
        assert relative_error(FromPixels(model, P)(pixels), model(images)) <= rounding(model, images)


def member(name: str, width: float, side: int) -> nn.Module:
    model = zoo.create_model(name, num_classes=3, width=width)
    randomize(model, (8, 3, side, side))
    return zoo.remember(model, Manifest(zoo.manifest_of(model).arch, preprocessing=Preprocessing((3, side, side), side)))


def test_squeeze_excite_and_groups_in_ncnn(tmp_path: Path) -> None:
    needs("ncnn")
    for name in ("repvgg_b1g4", "repvgg_d2se"):
        export(member(name, 1 / 32, 32), "ncnn", tmp_path, name, log=silent)  # which proves it
    assert "ConvolutionDepthWise" in (tmp_path / "repvgg_b1g4.ncnn.param").read_text()
    assert "BinaryOp" in (tmp_path / "repvgg_d2se.ncnn.param").read_text()


@pytest.mark.slow  # all of them in five minutes
@pytest.mark.parametrize("to", list(FORMATS))
@pytest.mark.parametrize("name", list(FAMILY))
def test_every_member_in_every_format(name: str, to: str, tmp_path: Path) -> None:
    needs(to)
    path = export(member(name, 1 / 32, 32), to, tmp_path, log=silent)
    parity = json.loads(report_of(path).read_text())["parity"]
    assert parity["error"]["relative"] < parity["bound"]["relative"]


@pytest.mark.slow
@pytest.mark.parametrize("to", list(FORMATS))
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_members_at_full_size(name: str, to: str, tmp_path: Path) -> None:
    needs(to)
    path = export(member(name, 1, 224), to, tmp_path, log=silent)
    parity = json.loads(report_of(path).read_text())["parity"]
    assert parity["error"]["relative"] < parity["bound"]["relative"]


@pytest.mark.parametrize("to", ["onnx", *(pytest.param(to, marks=pytest.mark.slow) for to in ("openvino", "mnn", "pt2"))])
def test_masks(to: str, tmp_path: Path) -> None:
    """Of one size; each pixel is a prediction."""
    needs(to)
    model = zoo.create_model("pspnet_repvgg_micro_fast", num_classes=5, width=0.125)
    randomize(model, (4, 3, 33, 33))
    zoo.remember(model, Manifest(zoo.manifest_of(model).arch, preprocessing=Preprocessing((3, 40, 24), 40)))
    path = export(model, to, tmp_path, log=silent)
    images = torch.randn(2, 3, 40, 24)
    allowed = rounding(model, images, times=ENGINES)
    assert relative_error(opened(path, to, images)(images), exact(reparameterize(model), images.double())) <= allowed
    assert json.loads(report_of(path).read_text())["parity"]["predictions"] == 8 * 40 * 24
    with pytest.raises(ValueError, match=r"a PSPNet's file is for images of one size.*: leave out --any-size"):
        export(model, to, tmp_path, shape=Shape(any_size=True), log=silent)


# --------------------------------------------------------------------------------------------------------- what is refused


def test_trap_8_a_file_that_computes_something_else_is_not_kept(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnx")
    from repvgg.deploy.engines import onnxruntime

    write, other = onnxruntime.write, reparameterize(model)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(0.01)
    monkeypatch.setattr(onnxruntime, "write", lambda _, *rest: write(other, *rest))
    with pytest.raises(ValueError, match="the onnx file computes something else, so it was not kept: relative error"):
        export(model, "onnx", tmp_path / "new", log=silent)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_loaded_back_is_not_kept(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openvino")
    from repvgg.deploy.engines import openvino

    monkeypatch.setattr(openvino, "write", lambda model, signature, path, metadata: path.write_text("<net"))
    with pytest.raises(ValueError, match=r"model\.xml cannot be loaded back \([^\n]*\)$"):
        export(model, "openvino", tmp_path, log=silent)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fold_is_refused(tmp_path: Path) -> None:
    model = small()
    model.get_submodule("stages.0.1.block").add_module("relu", nn.Sequential(nn.ReLU()).eval())
    with pytest.raises(ReparamError, match=r"stages\.0\.1\.block"):
        export(model, "onnx", tmp_path, log=silent)
    with pytest.raises(ReparamError, match="is in train mode"):
        export(small().train(), "onnx", tmp_path, log=silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "shape", "reason"),
    [
        ("tflite", Shape(), "no format 'tflite': there are onnx, openvino, ncnn, mnn, pt2, aotinductor"),
        ("ncnn", Shape(batch_size=4), "ncnn runs one image at a time: leave out --batch-size"),
        ("mnn", Shape(pixels=True), "mnn graphs take no uint8 pixels: leave out --pixels"),
        ("onnx", Shape(batch_size=-1), "--batch-size -1: at least 1, or 0 for any"),
        ("onnx", Shape(any_size=True, image_size=(32, 32)), "leave out --any-size or --image-size"),
    ],
)
def test_wishes_that_cannot_be_met(to: str, shape: Shape, reason: str, model: nn.Module, tmp_path: Path) -> None:
    if to in FORMATS:
        needs(to)
    with pytest.raises(ValueError, match=reason):
        export(model, to, tmp_path, shape=shape, log=silent)


def test_a_runtime_that_is_not_installed(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the engine mnn needs onnx, onnxscript, MNN: pip install onnx onnxscript MNN"):
        export(model, "mnn", tmp_path, log=silent)


def test_a_folder_that_cannot_be_written(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        export(model, "pt2", tmp_path / "file", log=silent)


def test_a_file_of_something_else_stays(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "a0.pt2").write_text("precious")
    with pytest.raises(FileError, match=r"holds the a0\.pt2 of something else, which would be lost"):
        export(model, "pt2", tmp_path, "a0", log=silent)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a0.pt2", "precious")]


@pytest.mark.slow
def test_the_checkpoint_that_is_exported_is_not_replaced(model: nn.Module, tmp_path: Path) -> None:
    """Its name is what OpenVINO calls its weights."""
    needs("openvino")
    (tmp_path / "pytorch_model.bin").write_text("precious")
    with pytest.raises(FileError, match=r"holds the pytorch_model\.bin of something else"):
        export(model, "openvino", tmp_path, "pytorch_model", log=silent)
    assert (tmp_path / "pytorch_model.bin").read_text() == "precious"


def test_comparators_are_exported_too(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    needs("openvino")
    net: nn.Module = zoo.create_model("resnet18", num_classes=3)
    preprocessing = Preprocessing((3, 32, 32), 32)
    net = zoo.remember(randomize(net, (8, 3, 32, 32)), Manifest(zoo.manifest_of(net).arch, preprocessing=preprocessing))
    export(net, "openvino", tmp_path, log=silent)
    with pytest.raises(ValueError, match="ncnn files are written of plain networks in deploy form alone, and ResNet is none"):
        export(net, "ncnn", tmp_path, log=silent)


def test_real_images_are_prepared_as_the_file_takes_them() -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10, in_chans=1, width=0.125, small_input=True).eval()
    preprocessing = Preprocessing((1, 16, 16), 16, mean=(0.5,), std=(0.25,))
    zoo.remember(model, Manifest(zoo.manifest_of(model).arch, preprocessing=preprocessing))
    normalised, pixels = (real_images(model, "digits", 5, shape) for shape in (Shape(), Shape(pixels=True)))
    assert pixels.shape == (5, 1, 16, 16)
    assert torch.equal(pixels, pixels.round())
    torch.testing.assert_close(normalised, (pixels / 255 - 0.5) / 0.25)


def test_photos_with_masks_are_compared_on_without_them(tmp_path: Path) -> None:
    camvid = make_camvid(tmp_path / "camvid")
    net = zoo.create_model("pspnet_repvgg_micro_fast", num_classes=11, width=0.125)
    zoo.remember(net, Manifest(zoo.manifest_of(net).arch, preprocessing=P))
    assert real_images(net, f"camvid:{camvid}", 2).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="digits: its images have 1 channels, and the model takes 3"):
        real_images(net, "digits", 2)
