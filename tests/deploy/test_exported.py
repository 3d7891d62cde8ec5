"""exported.py, formats.py: files that were exported run in their own runtime, and others are refused."""

import json
from pathlib import Path

import pytest
from conftest import relative_error
from deploying import has, silent, wanted
from rounding import ENGINES, rounding
from torch import Tensor, nn

from repvgg.deploy import engines
from repvgg.deploy.export import Shape, export
from repvgg.deploy.formats import exported_file, report_of
from repvgg.deploy.load import load_engine
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.manifest import Manifest, Preprocessing

pytestmark = pytest.mark.usefixtures("own_cache")


OTHERS = [pytest.param(name, name, marks=pytest.mark.slow) for name in ("openvino", "mnn")]  # test_export.py opens them too


HOSTILE_NCNN = {
    "blobs of which there are none": ("2 0", "Input images 0 1 images", "ReLU logits 1 1 images logits"),
    "a blob that is not there": ("2 2", "Input images 0 1 images", "ReLU logits 1 1 nothing logits"),
    "too few weights": (
        "2 2",
        "Input images 0 1 images",
        "Convolution logits 1 1 images logits 0=1000 1=3 11=3 2=1 12=1 3=1 13=1 4=1 14=1 5=1 6=10 9=0",
    ),
    "a classifier of a map": ("2 2", "Input images 0 1 images", "InnerProduct logits 1 1 images logits 0=2 1=1 2=6 9=0"),
    "a layer of another kind": ("2 2", "Input images 0 1 images", "Crop logits 1 1 images logits"),
    "a line cut off": ("2 2", "Input images 0 1 images", "ReLU logits"),
}


@pytest.mark.parametrize("kind", HOSTILE_NCNN)
def test_a_strangers_ncnn_file_does_not_reach_ncnn(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would write beyond its memory."""
    has("ncnn")
    import ncnn

    monkeypatch.setattr(ncnn.Net, "load_param", lambda *_: pytest.fail("read by ncnn"))
    path = tmp_path / "x.ncnn.param"
    path.write_text("\n".join(["7767517", *HOSTILE_NCNN[kind], ""]))
    floats = 11 if "few" in kind else 8 if "classifier" in kind else 0
    path.with_suffix(".bin").write_bytes(bytes(4 * (floats + 1000 * ("few" in kind))))
    manifest = Manifest({}, preprocessing=Preprocessing((3, 32, 32), 32))
    report_of(path).write_text(json.dumps({"manifest": json.loads(manifest.to_json()), "input": {"shape": [1, 3, 32, 32]}}))
    with pytest.raises(ValueError, match="ncnn cannot open it, it is damaged"):
        load_engine(path)


@pytest.mark.parametrize(("to", "name"), [("onnx", "onnxruntime"), ("ncnn", "ncnn"), *OTHERS])
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
    from repvgg.deploy.engines import Signature
    from repvgg.deploy.engines.graph import to_onnx

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
    (tmp_path / "best.safetensors").touch()  # the folder is a run's
    assert exported_file(tmp_path) is None
