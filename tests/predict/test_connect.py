"""connect.py: which cluster is joined, and what its workers are told."""

import socket
from pathlib import Path

import pytest

from repvgg.predict import connect


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not connect._gone()  # there has been none
    (tmp_path / "ray").mkdir()
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        (tmp_path / "ray/ray_current_cluster").write_text("{}:{}\n".format(*there.getsockname()))
        assert not connect._gone()
    assert connect._gone()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # which goes before it
    assert not connect._gone()


def test_paths_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    assert connect.absolute("photos") == str(tmp_path / "photos")
    assert connect.absolute("hf:photos") == f"hf:{tmp_path / 'photos'}"
    for name in ("digits", "hf:user/name", "s3://bucket/photos", "repvgg_a0"):
        assert connect.absolute(name) == name


def test_the_reason_is_what_the_task_said() -> None:
    error = RuntimeError("a task failed")
    error.__cause__ = OSError("no space left\non the disk")
    assert connect.reason_of(error) == "no space left"
