"""from_timm.py: a network of timm as a folded ONNX file, from its name or a checkpoint; and by its bare name in `repvgg bench`."""

from pathlib import Path

import pytest
import torch
from conftest import randomize, relative_error

from repvgg import cli
from repvgg.bench.models import Candidate, bench
from repvgg.deploy.engines import Options, runtime
from repvgg.deploy.from_timm import convert_timm, resolve
from repvgg.disk import FileError

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
NAME = "test_byobnet"  # timm's own for its tests: small, with every sort of its blocks


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_convert_with_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model(NAME), (8, 3, 160, 160))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    cli.main(["convert", f"timm:{NAME}", str(tmp_path / "a.onnx"), "--checkpoint", str(tmp_path / "a.pth")])
    assert "equal" in capsys.readouterr().err
    assert "BatchNormalization" not in kinds(tmp_path / "a.onnx")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert relative_error(runtime("onnxruntime").open_file(tmp_path / "a.onnx", Options((3, 160, 160)))(x), model(x)) < 1e-4


def test_random_weights_are_said_and_faults_are_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    convert_timm(NAME, tmp_path / "a.onnx", None, said.append)
    assert said[0] == f"timm:{NAME}: random weights; --checkpoint FILE takes trained ones"
    torch.save({"a": torch.zeros(2)}, tmp_path / "b.pth")
    for name, target, checkpoint, kind, words in (
        ("none_such", "a.onnx", None, ValueError, "timm cannot make none_such"),
        (NAME, "a.pt", None, ValueError, "is written as .onnx"),
        (NAME, "c.onnx", tmp_path / "b.pth", FileError, f"b.pth: does not fit timm's {NAME}"),
    ):
        with pytest.raises(kind, match=words):
            convert_timm(name, tmp_path / target, checkpoint, said.append)
    assert not (tmp_path / "c.onnx").exists()


def test_names_of_timm_in_bench() -> None:
    assert [resolve(n) for n in ("RepVGG-A0", "timm:repvgg_a0", NAME)] == ["repvgg_a0", "timm:repvgg_a0", f"timm:{NAME}"]
    with pytest.raises(ValueError, match="no model 'repvgg_a'"):
        resolve("repvgg_a")
    report = bench(
        [Candidate(NAME, form=form) for form in ("deploy", "training")], batch_size=2, rounds=1, batches=1, warmup=0, log=str
    )
    deploy, training = report.rows
    assert deploy.input_size == (3, 160, 160)
    assert deploy.left_unfolded == 0
    assert deploy.cost.params < training.cost.params
