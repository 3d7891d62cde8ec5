"""train/guard.py: a process that waits in C++ is deaf to signals, and ends all the same."""

import os
import signal
import textwrap
import time
from pathlib import Path

import pytest
from forks import Forks, Started

DEAF = """
import os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from repvgg.train import guard

guard.GRACE = 0.3
for signum in (signal.SIGTERM, signal.SIGINT):  # heard, also where a shell has a background job ignore SIGINT; and in vain,
    signal.signal(signum, lambda *_: None)  # also where it comes before the wait
store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=120), wait_for_workers=False)
with guard.Guard("repvgg (process 7)") as watch:
    {before}
    with open("waits.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename("waits.new", "waits")
    store.get("what nobody sets")
"""


def run(forks: Forks, folder: Path, before: str, *wanted: int) -> tuple[int, str]:
    """The exit code and what it said of a process that waits, and gets these signals."""
    with forks.start(DEAF.format(before=before), folder) as process:
        waiting(process, folder)
        for signum in wanted:
            os.kill(process.pid, signum)
        ended = process.wait(60)
    return ended.code, ended.err


def waiting(process: Started, folder: Path) -> int:
    """Return the number of the process that waits, once it does."""
    while not (folder / "waits").exists():
        assert process.poll() is None, process.said()
        time.sleep(0.005)
    return int((folder / "waits").read_text())


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_request_to_stop_is_heard(signum: int, forks: Forks, tmp_path: Path) -> None:
    code, said = run(forks, tmp_path, "watch.free()", signum)
    assert code == 128 + signum
    assert said == "repvgg (process 7): asked to stop, but another process does not answer; all saved files are intact\n"


def test_what_takes_too_long_ends(forks: Forks, tmp_path: Path) -> None:
    code, said = run(forks, tmp_path, "watch.limit(0.5, 'has not met the others')")
    assert (code, said) == (1, "repvgg (process 7): has not met the others\n")


def test_while_it_is_limited_a_request_is_met_at_once(forks: Forks, tmp_path: Path) -> None:
    code, _ = run(forks, tmp_path, "guard.GRACE = 1000; watch.limit(1000, 'late')", signal.SIGTERM)
    assert code == 143


def test_it_ends_with_the_process_that_started_it(forks: Forks, tmp_path: Path) -> None:
    deaf = textwrap.indent(DEAF.format(before="watch.free()"), "    ")
    with forks.start(f"import os, time\nif os.fork():\n    time.sleep(60)\nelse:\n{deaf}", tmp_path) as parent:
        orphan = waiting(parent, tmp_path)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while lives(orphan):
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.05)
        assert parent.said() == f"repvgg (process 7): the process that started this one ({parent.pid}) is gone\n"


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_leaves_nothing_behind() -> None:
    from repvgg.train.guard import Guard

    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with Guard("repvgg"):
        pass
    after = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(after)
    assert before == after
