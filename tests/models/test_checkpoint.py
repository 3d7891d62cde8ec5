"""checkpoint.py: files are written whole or not at all, whatever happens meanwhile."""

import os
import random
import resource
import signal
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_files import LAYERS, MANIFEST, tensors

import repvgg
from repvgg.disk import FileError, atomically
from repvgg.models import checkpoint, zoo
from repvgg.models.plain import PlainNet


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ""])
def test_there_and_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    checkpoint.write(path, tensors(), MANIFEST)
    back, manifest = checkpoint.read(path)
    assert manifest == MANIFEST
    assert {name: t.tolist() for name, t in back.items()} == {name: t.tolist() for name, t in tensors().items()}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_bare_state_dict_is_what_pytorch_expects(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "model.pth", tensors(), MANIFEST)
    bare = torch.load(tmp_path / "model.pth", weights_only=True)
    assert type(bare) is OrderedDict
    assert bare.keys() == tensors().keys()
    PlainNet(LAYERS).load_state_dict(bare, strict=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_views_are_written_alone(suffix: str, tmp_path: Path) -> None:
    whole = torch.arange(1_000_000.0)
    path = tmp_path / f"model{suffix}"
    checkpoint.write(path, {"x": whole[:2], "y": whole[:2], "z": whole[:6].view(2, 3).T}, MANIFEST)
    assert path.stat().st_size < 10_000
    assert {name: t.tolist() for name, t in checkpoint.read(path)[0].items()} == {
        "x": [0, 1],
        "y": [0, 1],
        "z": [[0, 3], [1, 4], [2, 5]],
    }


def test_any_length_of_header_is_read(tmp_path: Path) -> None:
    """A safetensors file begins with that length, and a pickle with the byte 128."""
    first_bytes = set()
    for words in range(40):
        path = tmp_path / "model.safetensors"
        checkpoint.write(path, tensors(), replace(MANIFEST, training={"word": "x" * 8 * words}))
        first_bytes.add(path.read_bytes()[0])
        assert checkpoint.read(path)[1] is not None
    assert 0x80 in first_bytes


def test_writing_leaves_no_trace_of_failure(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        atomically(tmp_path / "old", fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old", "old")]


def test_a_folder_that_is_missing_or_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    reasons = {"nowhere/model.safetensors": "no folder", "file/model.safetensors": "no folder", "folder": "Is a directory"}
    for place, reason in reasons.items():
        with pytest.raises(FileError, match=rf"{place}: cannot be written \(.*{reason}"):
            checkpoint.write(tmp_path / place, tensors(), MANIFEST)
    with pytest.raises(FileError, match="File name too long"):
        checkpoint.write(tmp_path / f"{'x' * 300}.safetensors", tensors(), MANIFEST)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def start(action: Callable[[], object]) -> int:
    """Run it in a process of its own, whose number this is."""
    if (child := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(1)
    return child


def in_child(action: Callable[[], object]) -> str:
    """What `action` raises, as text, in a process of its own."""
    reader, writer = os.pipe()

    def report() -> None:
        try:
            action()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())

    child = start(report)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_full_disk(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    checkpoint.write(path, tensors(), MANIFEST)
    before = path.read_bytes()

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoint.write(path, {"x": torch.zeros(100_000)}, MANIFEST)

    assert in_child(write) == f"FileError: {path}: cannot be written (File too large)"
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_disk_that_is_really_full(suffix: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def write(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"x" * 100_000)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        with pytest.raises(FileError, match=r"cannot be written \(No space left on device\)"):
            atomically(path, write)
        assert not list(Path(folder).iterdir())


def test_a_folder_and_a_file_without_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        checkpoint.write(path, tensors(), MANIFEST)
        path.chmod(0)
        Path(folder).chmod(0o555)

        def as_nobody(action: Callable[[], object]) -> str:
            def run() -> None:
                if os.geteuid() == 0:
                    os.setuid(65534)
                action()

            return in_child(run)

        denied = as_nobody(lambda: checkpoint.write(path, tensors(), MANIFEST))
        assert denied == f"FileError: {path}: cannot be written (Permission denied)"
        assert as_nobody(lambda: repvgg.load(path)) == f"FileError: {path}: cannot be read (Permission denied)"
        Path(folder).chmod(0o600)
        assert as_nobody(lambda: repvgg.load(path)) == f"FileError: {path}: cannot be read (Permission denied)"
        Path(folder).chmod(0o700)


def test_a_kill_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    moments = random.Random(0)
    checkpoint.write(path, {"x": torch.zeros(1_000_000)}, MANIFEST)
    seen = set()
    for first in range(0, 12_000, 1000):

        def write_on(first: int = first) -> None:
            for number in range(first, first + 1000):
                checkpoint.write(path, {"x": torch.full((1_000_000,), float(number))}, MANIFEST)

        before = path.stat().st_mtime_ns
        child = start(write_on)
        deadline = time.monotonic() + 60
        while path.stat().st_mtime_ns == before and time.monotonic() < deadline:  # a busy disk takes its time for the first
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        read, manifest = checkpoint.read(path)
        assert manifest == MANIFEST
        assert read["x"].shape == (1_000_000,)
        assert bool((read["x"] == read["x"][0]).all())
        seen.add(float(read["x"][0]))
    assert len(seen) == 12  # each of them got to write


def test_a_kill_between_writing_and_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.write(path, tensors(), MANIFEST)
    before = path.read_bytes()
    reader, writer = os.pipe()

    def tell_and_hang(_: int) -> None:
        os.write(writer, b"written")
        time.sleep(600)

    def write() -> None:
        monkeypatch.setattr(os, "fsync", tell_and_hang)
        checkpoint.write(path, {"x": torch.ones(5)}, MANIFEST)

    child = start(write)
    assert os.read(reader, 7) == b"written"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == before
    assert isinstance(repvgg.load(path), PlainNet)
    checkpoint.write(path, tensors(), replace(MANIFEST, training={}))
    assert zoo.manifest_of(repvgg.load(path)).training == {}
