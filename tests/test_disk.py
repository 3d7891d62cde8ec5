"""disk.py: files are whole or not there, on disk when they are said to be, and nothing is left lying about."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repvgg import disk
from repvgg.disk import FileError, atomically, out_of_memory


def test_the_folder_is_flushed_after_the_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that a power cut may undo the renaming."""
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name if sys.platform == "linux" else ""
        flushed.append((name, (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    atomically(tmp_path / "a", lambda path: path.write_text("x"))
    assert [there for _, there in flushed] == [False, True]
    if sys.platform == "linux":
        assert flushed[1][0] == tmp_path.name


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_the_killed_left_is_swept(tmp_path: Path) -> None:
    dead, old = dead_process(), time.time() - 2 * disk.STALE
    left = tmp_path / f".a.{dead}.tmp"
    fresh = tmp_path / f".a.{dead + 1}.tmp"  # perhaps of another machine, at work
    alive = tmp_path / f".a.{os.getppid()}.tmp"
    strange = (tmp_path / ".a.notes.tmp", tmp_path / f".b.{dead}.tmp", tmp_path / f"a.{dead}.tmp")
    for path in (left, fresh, alive, *strange):
        path.write_text("x")
        if path != fresh:
            os.utime(path, (old, old))
    atomically(tmp_path / "a", lambda path: path.write_text("y"))
    assert not left.exists()
    assert all(path.exists() for path in (fresh, alive, *strange))
    assert (tmp_path / "a").read_text() == "y"


def test_a_folder_that_cannot_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "flush_folder", fail)
    with pytest.raises(FileError, match=r"cannot be written \(Input/output error\)"):
        atomically(tmp_path / "a", lambda path: path.write_text("x"))


def test_memory_that_ran_out_is_known_by_its_words() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert out_of_memory(MemoryError())
    assert out_of_memory(OutOfMemoryError("CUDA"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
