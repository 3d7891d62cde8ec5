"""load.py: a callable that computes what the model does, whatever runs it; and the choice of the fastest."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from rounding import ENGINES, rounding
from torch import Tensor, nn

import repvgg
from repvgg.data import open_source
from repvgg.deploy import engines, load
from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.export import Shape, export, report_of
from repvgg.deploy.load import Runner, exported_file, fastest, load_engine, measure, open_model
from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparam import reparameterize
from repvgg.models import zoo
from repvgg.models.manifest import Preprocessing
from repvgg.models.pspnet import PSPNet
from repvgg.predict.labels import predict
from repvgg.train.evaluate import evaluate_model
from repvgg.train.loop import new_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def silent(line: str) -> None:
    pass


def wanted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = reparameterize(model).double()(images.double())
    return logits


def has(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)


# ------------------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "ncnn", "mnn", "openvino"])
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
    zoo.save(model, tmp_path / "m.safetensors")
    eager = load_engine(tmp_path / "m.safetensors", "eager")
    assert relative_error(eager(images), wanted(model, images)) <= rounding(model, images)
    with pytest.raises(ReparamError, match="is in train mode"):
        load_engine(nn.Sequential(nn.BatchNorm2d(3)), "eager")


def test_predict_and_evaluate_take_an_engine_for_a_model(model: nn.Module, tmp_path: Path) -> None:
    has("onnxruntime", "onnxscript")
    source = open_source("digits").limited(40)
    export(model, "onnx", tmp_path, log=silent)
    for runner in (load_engine(model, "onnxruntime", batch_size=16), load_engine(tmp_path, batch_size=16)):
        assert (runner.num_classes, zoo.manifest_of(runner).form) == (10, "deploy")
        got, exact = evaluate_model(runner, source, 16), evaluate_model(model, source, 16)
        assert torch.equal(got.confusion, exact.confusion)
        assert got.loss == pytest.approx(exact.loss, rel=1e-4)
    from PIL import Image

    Image.fromarray(source.val[0][0][0].numpy()).save(tmp_path / "scan.png")
    answers = [next(predict(m, [str(tmp_path / "scan.png")])) for m in (runner, model)]
    assert answers[0].labels[0][0] == answers[1].labels[0][0]


# --------------------------------------------------------------------------------------------------------------- exported files


@pytest.mark.parametrize(("to", "name"), [("onnx", "onnxruntime"), ("openvino", "openvino"), ("ncnn", "ncnn"), ("mnn", "mnn")])
def test_exported_files_run_in_their_own_runtime(to: str, name: str, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    has(*engines.ENGINES[name].packages)
    path = export(model, to, tmp_path, shape=Shape(batch_size=1 if to == "ncnn" else 2), log=silent)
    for place in (path, tmp_path):
        engine = load_engine(place, batch_size=4)
        assert engine.name == name
        assert relative_error(engine(images), wanted(model, images)) <= rounding(model, images, times=ENGINES)
        assert engine.manifest is not None
        assert engine.manifest.classes == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match=f"is for {name}, not for eager: leave out --engine"):
        load_engine(path, "eager")
    largest = max(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name} cannot open it, it is damaged or of another version") as error:
        load_engine(path)(images)
    assert "\n" not in str(error.value)


def test_files_that_are_not_ours(model: nn.Module, tmp_path: Path) -> None:
    has("onnx", "onnxscript", "onnxruntime", "ncnn")
    from repvgg.deploy.engines.graph import Signature, to_onnx

    (tmp_path / "x.onnx").write_bytes(to_onnx(reparameterize(model), Signature((1, 16, 16))))
    with pytest.raises(ValueError, match="was not written by repvgg export, it does not say what goes in and comes out"):
        load_engine(tmp_path / "x.onnx")
    path = export(model, "ncnn", tmp_path, "new", log=silent)
    report = json.loads(report_of(path).read_text())
    report["manifest"]["format_version"] = 2
    report_of(path).write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"new\.ncnn\.param: .*format version 2, this repvgg reads 1: upgrade repvgg") as error:
        load_engine(path)
    assert "\n" not in str(error.value)
    path.unlink()
    (tmp_path / "x.param").write_text("7767517\n")
    with pytest.raises(ValueError, match="was not written by repvgg export"):
        load_engine(tmp_path / "x.param")
    with pytest.raises(ValueError, match=r"holds x\.onnx, x\.param: name one of them"):
        exported_file(tmp_path)
    with pytest.raises(ValueError, match="a pt2 file is a program"):
        load_engine(tmp_path / "x.pt2")
    with pytest.raises(ValueError, match="no such file"):
        load_engine(tmp_path / "y.onnx")
    assert exported_file(tmp_path / "m.safetensors") is exported_file(tmp_path / "none") is None


# -------------------------------------------------------------------------------------------------------------------- the choice


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(engines, "installed", lambda *_: list(names))


def built(monkeypatch: pytest.MonkeyPatch, **makers: Callable[[nn.Module], Engine]) -> None:
    monkeypatch.setattr(engines, "build", lambda name, model, options: makers[name](model))


def engine_of(function: Callable[[Tensor], Tensor]) -> Engine:
    return Engine(lambda x: x, function, lambda x: x)


def test_the_fastest_that_computes_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick one that is wrong, a slow one that is right, and one that cannot be built."""

    def slow(network: nn.Module) -> Engine:
        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                for _ in range(6):
                    logits: Tensor = network(x)
            return logits

        return engine_of(run)

    def right(network: nn.Module) -> Engine:
        return engine_of(torch.no_grad()(network))

    def broken(network: nn.Module) -> Engine:
        raise ValueError("cannot run this")

    said: list[str] = []
    only(monkeypatch, "onnxruntime", "eager", "openvino", "ncnn")
    built(monkeypatch, onnxruntime=lambda _: engine_of(lambda x: torch.ones(len(x), 10)), eager=slow, openvino=right, ncnn=broken)
    deploy = reparameterize(model)
    found = measure(deploy, Options((1, 16, 16), 4), said.append)
    assert list(found) == ["openvino", "eager"]
    assert [line.split(",")[0] for line in said] == ["left out: onnxruntime", "left out: ncnn (cannot run this)"]
    assert fastest(deploy, Options((1, 16, 16), 4), silent) == "openvino"
    only(monkeypatch, "onnxruntime", "ncnn")
    with pytest.raises(ValueError, match="no engine runs this model in fp32 and computes the same"):
        measure(deploy, Options((1, 16, 16), 4), silent)


def test_the_choice_is_remembered_for_a_model_a_batch_and_a_machine(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def figures(*arguments: Any) -> dict[str, dict[str, float]]:
        asked.append(arguments)
        return {name: {"images_per_second": speed, "max_rel_err": 0.0} for name, speed in (("eager", 2.0), ("compile", 1.0))}

    monkeypatch.setattr(load, "measure", figures)
    for _ in range(2):
        assert load_engine(model, batch_size=2, log=silent).name == "eager"
    assert len(asked) == 1
    (kept,) = (tmp_path / "cache/repvgg/engines").iterdir()
    assert json.loads(kept.read_text())["fastest"] == "eager"
    load_engine(model, batch_size=3, log=silent)
    assert len(asked) == 2
    kept.write_text("{")  # damaged
    load_engine(model, batch_size=2, log=silent)
    assert len(asked) == 3
    other = reparameterize(model)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1)
    load_engine(other, batch_size=2, log=silent)
    assert len(asked) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # cannot be written
    assert load_engine(model, batch_size=2, log=silent).name == "eager"


def test_real_engines_are_measured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["eager", *(name for name in ("onnxruntime", "openvino") if all(map(find_spec, engines.ENGINES[name].packages)))]
    only(monkeypatch, *names)
    found = measure(reparameterize(model), Options((1, 16, 16), 2), silent)
    assert found.keys() <= set(names)
    assert all(f["images_per_second"] > 0 and f["max_rel_err"] < 1e-5 for f in found.values())


def test_what_is_refused(model: nn.Module) -> None:
    for wish, reason in (({"engine": "tensorrt"}, "no engine 'tensorrt'"), ({"batch_size": 0}, "--batch-size 0: at least 1")):
        with pytest.raises(ValueError, match=reason):
            load_engine(model, **wish)
    with pytest.raises(ValueError, match="the engine eager has no int8 on cpu"):
        load_engine(model, "eager", "int8")
    assert "eager" in repr(load_engine(model, "eager"))


def test_masks_are_left_to_pytorch(tmp_path: Path) -> None:
    has("onnxruntime", "onnxscript")
    model = zoo.create_model("pspnet_repvgg_micro_fast", num_classes=3, width=0.125).eval()
    zoo.remember(model, replace(zoo.manifest_of(model), preprocessing=Preprocessing((3, 40, 40), 40)))
    zoo.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors: masks of images of any size are made by PyTorch: leave out --engine"):
        open_model(str(tmp_path / "m.safetensors"), "auto", "fp32", 1, "cpu", silent)
    assert isinstance(open_model(str(tmp_path / "m.safetensors"), "", "fp32", 1, "cpu", silent), PSPNet)
    path = export(randomize(model, (4, 3, 33, 33)), "onnx", tmp_path, log=silent)
    with pytest.raises(ValueError, match=r"model\.onnx: masks of images of any size are made by PyTorch: name the model file"):
        open_model(str(path), "", "fp32", 1, "cpu", silent)
    assert load_engine(path)(torch.zeros(2, 3, 40, 40)).shape == (2, 3, 40, 40)  # of its own size it runs


@pytest.mark.slow
@pytest.mark.parametrize("name", list(engines.ENGINES))
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
