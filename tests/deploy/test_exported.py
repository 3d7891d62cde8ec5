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

pytestmark = pytest.mark.usefixtures("own_cache")


OTHERS = [pytest.param(name, name, marks=pytest.mark.slow) for name in ("openvino", "mnn")]  # test_export.py opens them too


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
