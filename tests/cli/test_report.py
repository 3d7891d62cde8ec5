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
    assert "which run? repvgg report RUN" in refused(capsys, "report")
    assert "--out is for several runs" in refused(capsys, "report", tmp_path / "a", "--out", tmp_path / "one.html")
    assert "--data is for the page of one run" in refused(capsys, "report", tmp_path / "a", tmp_path / "b", "--data", "digits")


def test_predictions_with_their_reasons(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ("predict", run / "deploy.safetensors", scans, "--explain", "cam", "--out", tmp_path, "--json")
    assert repvgg(*words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["explanation"] for line in lines} == {str(path) for path in tmp_path.glob("*.cam.png")}
    assert len(lines) == 6
    assert "leave out --engine" in refused(capsys, *words, "--engine", "eager")
    whole_set = ("predict", run / "deploy.safetensors", "--data", "digits", "--out", tmp_path / "parts", "--explain", "cam")
    assert "--explain cam is for images that are named" in refused(capsys, *whole_set)
    assert "--concurrency and --gpus are for --ray" in refused(capsys, *whole_set[:-2], "--gpus", 1)
    assert "--workers is for one process" in refused(capsys, *whole_set[:-2], "--ray", "auto", "--workers", 1)
    for flags in (("--split", "test"), ("--part-size", 8), ("--workers", 1), ("--ray", "auto")):
        assert "are for a whole data set" in refused(capsys, "predict", run / "deploy.safetensors", scans, *flags)
