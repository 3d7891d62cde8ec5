"""disk.py: one process at a time works in a folder."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from repvgg.disk import FileError, hold

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


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be locked"), hold(tmp_path / "none"):
        pass
