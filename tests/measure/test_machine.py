"""machine.py: what stands beside a measured figure."""

import importlib.util
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

import repvgg
from repvgg.measure import machine
from repvgg.measure.machine import this_machine, write_record


def test_the_machine() -> None:
    machine = this_machine()
    kind = ["kind", "instruction_sets"] if importlib.util.find_spec("repvgg_engine") else []
    expected = "cores threads memory_gib gpu system python versions commit date"
    assert list(machine) == ["processor", *kind, *expected.split()]
    assert machine["processor"]
    assert machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads()
    assert 0.1 < machine["memory_gib"] < 1e5
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0] or machine["versions"]["torch"] == torch.__version__
    assert "numpy" in machine["versions"]
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(machine["date"]) < timedelta(minutes=1)


def test_processors_of_one_brand_are_told_apart() -> None:
    pytest.importorskip("repvgg_engine", exc_type=ImportError)
    machine = this_machine()
    assert "portable" in machine["instruction_sets"]
    if Path("/proc/cpuinfo").exists():
        assert "model" in machine["kind"] or "CPU part" in machine["kind"]


def test_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "repvgg_engine", None)
    assert "kind" not in this_machine()


def test_a_gpu_that_had_no_part_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU {device}")
    assert [this_machine(device)["gpu"] for device in ("", "cpu", "cuda:1")] == ["the GPU None", None, "the GPU cuda:1"]
    write_record(tmp_path / "a.json", {}, "cpu")
    assert json.loads((tmp_path / "a.json").read_text())["machine"]["gpu"] is None


def test_figures_are_written_with_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    write_record(path, {"top1": 0.9, "times": [1, 2]})
    written = json.loads(path.read_text())
    assert written["top1"] == 0.9
    assert written["times"] == [1, 2]
    assert written["machine"]["python"] == this_machine()["python"]
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    code = tmp_path / "src" / "machine.py"
    code.parent.mkdir()
    code.write_text("first")
    monkeypatch.setattr(machine, "__file__", str(code))
    monkeypatch.setenv("REPVGG_COMMIT", "as the copy was told")
    assert machine._commit() == "as the copy was told"  # no checkout
    git("init", "-q")
    (tmp_path / "theirs").write_text("")
    git("add", "theirs")
    git("commit", "-qm", "a checkout that the code is not part of")
    assert machine._commit() == "as the copy was told"
    monkeypatch.delenv("REPVGG_COMMIT")
    assert machine._commit() is None
    git("add", "src")
    git("commit", "-qm", "now it is")
    monkeypatch.setenv("REPVGG_COMMIT", "something else")
    assert machine._commit() == git("rev-parse", "--short", "HEAD")
    code.write_text("changed")
    assert machine._commit() == git("rev-parse", "--short", "HEAD") + "+"


def test_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("REPVGG_COMMIT", raising=False)
    assert machine._commit() is None


def test_the_version_is_that_of_the_package() -> None:
    assert this_machine()["versions"].get("repvgg") in (None, repvgg.__version__)
