"""`repvgg report` and `predict --explain` as a user calls them."""

import json
import shutil
from pathlib import Path

from commands import Captured, refused, repvgg


def test_a_run_and_two_runs(run: Path, tmp_path: Path, capsys: Captured) -> None:
    for name in ("a", "b"):
        shutil.copytree(run / "run", tmp_path / name)
    assert repvgg("report", tmp_path / "a", "--device", "cpu") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a/run.html'}\n"
    assert (tmp_path / "a/report/confusion.png").exists()
    assert repvgg("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "two.html") == 0
    assert str(tmp_path / "two.html") in capsys.readouterr().out
    assert "no run folder" in refused(capsys, "report", tmp_path)


def test_predictions_with_their_reasons(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ("predict", run / "deploy.safetensors", scans, "--explain", "cam", "--out", tmp_path, "--json")
    assert repvgg(*words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["explanation"] for line in lines} == {str(path) for path in tmp_path.glob("*_cam.png")}
    assert len(lines) == 6
    assert "leave out --engine" in refused(capsys, *words, "--engine", "eager")
