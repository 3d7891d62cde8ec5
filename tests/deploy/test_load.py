"""load.py: a callable that computes what the model does, whatever runs it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import centred, randomize, relative_error, varied
from deploying import has, silent, wanted
from PIL import Image
from rounding import ENGINES, rounding
from torch import Tensor, nn

import repvgg
from repvgg.data import open_source
from repvgg.deploy import engines
from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.export import export
from repvgg.deploy.load import load_engine, open_model
from repvgg.deploy.runner import Runner
from repvgg.fold.algebra import ReparamError
from repvgg.models import keys, zoo
from repvgg.models.load import save
from repvgg.models.manifest import Preprocessing
from repvgg.models.pspnet import PSPNet
from repvgg.predict.labels import predict
from repvgg.train.evaluate import batches, evaluate_model

pytestmark = pytest.mark.usefixtures("own_cache")


# ------------------------------------------------------------------------------------------------------------ what it computes


ANY = ("eager", "ncnn", "openvino")  # of any batch, of one image, of one batch; the others are as one of them


@pytest.mark.parametrize("name", [*ANY, *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnxruntime", "mnn"))])
def test_any_number_of_images_numpy_or_torch(name: str, model: nn.Module, images: Tensor) -> None:
    has(*engines.ENGINES[name].packages)
    engine = repvgg.load_engine(model, name, batch_size=3)
    exact, allowed = wanted(model, images), rounding(model, images, times=ENGINES)
    for count in (7, 3, 1):
        assert relative_error(engine(images[:count]), exact[:count]) <= allowed
    logits = engine(images.numpy())
    assert (logits.dtype, logits.shape) == ("float32", (7, 10))
    assert relative_error(torch.from_numpy(logits), exact) <= allowed
    assert engine(images[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"images are \[N, 1, 16, 16\] for this engine, not \[7, 1, 16, 8\]"):
        engine(images[..., :8])


def test_threads_take_turns(model: nn.Module, images: Tensor) -> None:
    has("openvino", "onnxscript")
    engine = load_engine(model, "openvino", batch_size=2)
    exact, allowed = wanted(model, images), rounding(model, images, times=ENGINES)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: engine(images[i : i + 2]), list(range(6)) * 8))
    for i, logits in zip(list(range(6)) * 8, answers, strict=True):
        assert relative_error(logits, exact[i : i + 2]) <= allowed


def test_a_network_of_somebody_else_and_files(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    engine = load_engine(conv, "eager", input_size=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(engine(x), conv(x)) <= rounding(conv, x)
    save(model, tmp_path / "m.safetensors")
    eager = load_engine(tmp_path / "m.safetensors", "eager")
    assert relative_error(eager(images), wanted(model, images)) <= rounding(model, images)
    with pytest.raises(ReparamError, match="is in train mode"):
        load_engine(nn.Sequential(nn.BatchNorm2d(3)), "eager")


def test_a_manifest_need_not_say_how_many_classes(model: nn.Module, tmp_path: Path) -> None:
    runner = load_engine(model, "eager")
    arch = {name: value for name, value in (zoo.manifest_of(model).arch or {}).items() if name != "num_classes"}
    runner.manifest = replace(zoo.manifest_of(model), arch=arch)
    assert runner.num_classes is None
    Image.new("L", (8, 8)).save(tmp_path / "scan.png")
    assert len(repvgg.predict(runner, str(tmp_path / "scan.png"))) == 1


def test_predict_and_evaluate_take_an_engine_for_a_model(model: nn.Module, tmp_path: Path) -> None:
    has("onnxruntime", "onnxscript")
    source = open_source("digits").limited(40)
    images, _ = next(batches(source.val, zoo.manifest_of(model).preprocessing, 40))
    model = zoo.remember(centred(copy.deepcopy(model), images), zoo.manifest_of(model))
    export(model, "onnx", tmp_path, log=silent)
    for runner in (load_engine(model, "onnxruntime", batch_size=16), load_engine(tmp_path, batch_size=16)):
        assert (runner.num_classes, zoo.manifest_of(runner).form) == (10, "deploy")
        got, exact = evaluate_model(runner, source, 16), evaluate_model(model, source, 16)
        assert varied(exact.confusion.sum(0))
        assert torch.equal(got.confusion, exact.confusion)
        assert got.loss == pytest.approx(exact.loss, rel=1e-4)
    Image.fromarray(source.val[0][0][0].numpy()).save(tmp_path / "scan.png")
    answers = [next(predict(m, [str(tmp_path / "scan.png")])) for m in (runner, model)]
    assert answers[0].labels[0][0] == answers[1].labels[0][0]


def test_what_is_refused(model: nn.Module) -> None:
    for wish, reason in (({"engine": "tensorrt"}, "no engine 'tensorrt'"), ({"batch_size": 0}, "--batch-size 0: at least 1")):
        with pytest.raises(ValueError, match=reason):
            load_engine(model, **wish)
    with pytest.raises(ValueError, match="the engine eager has no int8 on cpu"):
        load_engine(model, "eager", "int8")
    assert "eager" in repr(load_engine(model, "eager"))


def test_what_is_left_out_of_a_strangers_file_is_told(model: nn.Module, tmp_path: Path) -> None:
    tensors = keys.to_foreign(model.state_dict(), "official")
    nested = {f"net.{name}": tensor for name, tensor in tensors.items()}
    torch.save({**nested, "loss.weight": torch.ones(2)}, tmp_path / "theirs.pth")
    torch.save(tensors, tmp_path / "plain.pth")
    for name, told in (("theirs.pth", ["left out, as no part of the network: loss.weight"]), ("plain.pth", [])):
        for engine in ("", "eager"):
            said: list[str] = []
            open_model(str(tmp_path / name), engine, "fp32", 1, "cpu", said.append)
            load_engine(model, "eager", log=said.append)
            assert said == told
        said.clear()
        load_engine(tmp_path / name, "eager", log=said.append)
        assert said == told


def test_masks_are_left_to_pytorch(tmp_path: Path) -> None:
    has("onnxruntime", "onnxscript")
    model = zoo.create_model("pspnet_repvgg_micro_fast", num_classes=3, width=0.125).eval()
    zoo.remember(model, replace(zoo.manifest_of(model), preprocessing=Preprocessing((3, 40, 40), 40)))
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors: masks of images of any size are made by PyTorch: leave out --engine"):
        open_model(str(tmp_path / "m.safetensors"), "auto", "fp32", 1, "cpu", silent)
    assert isinstance(open_model(str(tmp_path / "m.safetensors"), "", "fp32", 1, "cpu", silent), PSPNet)
    path = export(randomize(model, (4, 3, 33, 33)), "onnx", tmp_path, log=silent)
    with pytest.raises(ValueError, match=r"model\.onnx: masks of images of any size are made by PyTorch: name the model file"):
        open_model(str(path), "", "fp32", 1, "cpu", silent)
    assert load_engine(path)(torch.zeros(2, 3, 40, 40)).shape == (2, 3, 40, 40)  # of its own size it runs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, known in engines.ENGINES.items() if known.on_cpu])
def test_ten_thousand_calls_leak_nothing(name: str, model: nn.Module) -> None:
    psutil = pytest.importorskip("psutil")
    has(*engines.ENGINES[name].packages)
    engine: Runner = load_engine(model, name)
    image, process = torch.randn(1, 1, 16, 16), psutil.Process()
    for _ in range(1000):
        engine(image)
    before = process.memory_info().rss
    for _ in range(10_000):
        engine(image)
    assert process.memory_info().rss - before < 8 * 2**20  # 800 bytes a call


def test_logits_are_where_the_images_are() -> None:
    """On a GPU labels are there too; the meta device stands for it."""
    options = Options((3, 4, 4), batch_size=2)
    engine = Engine(lambda x: x, lambda x: x, lambda x: torch.zeros(2, 5), 2)
    runner = Runner("somebody's", engine, options, None)
    assert runner(torch.empty(2, 3, 4, 4, device="meta")).device.type == "meta"
    assert runner(torch.zeros(2, 3, 4, 4)).device.type == "cpu"
