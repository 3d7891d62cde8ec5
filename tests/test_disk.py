"""disk.py: files are whole or not there, on disk when they are said to be; one process at a time works in a folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from repvgg import disk
from repvgg.disk import FileError, atomically, hold, out_of_memory, read_text

HOLDER = "import sys, time; from repvgg.disk import hold\nwith hold(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"process {holder.pid} on {socket.gethostname()} works in it"), hold(tmp_path):
        pass


def test_a_dead_holder_is_followed(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_forked_child_does_not_hold_for_a_dead_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from repvgg.disk import hold\n"
        "with hold(sys.argv[1]):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)  # it is there
            with hold(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_it_is_let_go_of_after_an_error_and_held_once_in_a_process(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path):
        with pytest.raises(FileError, match="which is this one"), hold(tmp_path):
            pass
        with pytest.raises(FileError, match="which is this one"), hold(tmp_path):  # still
            pass
    with hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "device", "pipe"])
def test_a_strangers_lock_that_leads_elsewhere_is_refused(kind: str, tmp_path: Path) -> None:
    (precious := tmp_path / "precious").write_text("years of work")
    (folder := tmp_path / "unpacked").mkdir()
    if kind == "pipe":
        os.mkfifo(folder / ".lock")
    else:
        (folder / ".lock").symlink_to(precious if kind == "file" else "/dev/zero")
    with pytest.raises(FileError, match=r"\.lock: is .*: remove"), hold(folder):
        pass
    assert precious.read_text() == "years of work"


def test_a_text_is_read_of_a_file_alone_and_of_no_more_than_any_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text := tmp_path / "settings.json").write_text("é" * 20, encoding="utf-8")
    (link := tmp_path / "link").symlink_to(text)
    os.mkfifo(pipe := tmp_path / "pipe")
    assert read_text(text) == read_text(link) == "é" * 20
    for endless in (Path("/dev/zero"), pipe, tmp_path):
        with pytest.raises(FileError, match="is no file"):
            read_text(endless)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
    monkeypatch.setattr(disk, "LONGEST", 19)
    with pytest.raises(FileError, match="is larger than 19"):
        read_text(text)


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be locked"), hold(tmp_path / "none"):
        pass


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
    left = tmp_path / f".a.{dead}-0123abcd.tmp"
    fresh = tmp_path / f".a.{dead + 1}.tmp"  # perhaps of another machine, at work
    alive = tmp_path / f".a.{os.getppid()}-0123abcd.tmp"
    strange = (tmp_path / ".a.notes.tmp", tmp_path / f".b.{dead}.tmp", tmp_path / f"a.{dead}.tmp")
    for path in (left, fresh, alive, *strange):
        path.write_text("x")
        if path != fresh:
            os.utime(path, (old, old))
    atomically(tmp_path / "a", lambda path: path.write_text("y"))
    assert not left.exists()
    assert all(path.exists() for path in (fresh, alive, *strange))
    assert (tmp_path / "a").read_text() == "y"


def test_two_processes_of_one_number_do_not_write_the_same_temporary_file(tmp_path: Path) -> None:
    """Two containers that share a folder."""
    names = set[Path]()

    def write(path: Path) -> None:
        names.add(path)
        path.write_text("x")

    for _ in range(2):
        atomically(tmp_path / "a", write)
    assert len(names) == 2


def test_a_folder_that_cannot_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = disk.flush

    def fail(path: Path) -> None:
        if path.is_dir():
            raise OSError(5, "Input/output error")
        flushed(path)

    monkeypatch.setattr(disk, "flush", fail)
    with pytest.raises(FileError, match=r"cannot be written \(Input/output error\)"):
        atomically(tmp_path / "a", lambda path: path.write_text("x"))


def test_memory_that_ran_out_is_known_by_its_words() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert out_of_memory(MemoryError())
    assert out_of_memory(OutOfMemoryError("CUDA"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    assert out_of_memory(RuntimeError("std::bad_alloc"))
    assert out_of_memory(RuntimeError("Exception from CPU plugin: Failed to allocate memory"))
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
