"""train/guard.py: a process that waits in C++ is deaf to signals, and ends all the same."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

DEAF = """
import os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from repvgg.train import guard

guard.GRACE = 1.0
for signum in (signal.SIGTERM, signal.SIGINT):  # heard, also where a shell has a background job ignore SIGINT; and in vain,
    signal.signal(signum, lambda *_: None)  # also where it comes before the wait
store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=120), wait_for_workers=False)
with guard.Guard("repvgg (process 7)") as watch:
    {before}
    print(os.getpid(), flush=True)
    store.get("what nobody sets")
"""


def run(before: str, *wanted: int) -> tuple[int, str]:
    """The exit code and what it said of a process that waits, and gets these signals."""
    command = [sys.executable, "-c", textwrap.dedent(DEAF).format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for signum in wanted:
            process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_request_to_stop_is_heard(signum: int) -> None:
    code, said = run("watch.free()", signum)
    assert code == 128 + signum
    assert said == "repvgg (process 7): asked to stop, but another process does not answer; all saved files are intact\n"


def test_what_takes_too_long_ends() -> None:
    code, said = run("watch.limit(0.5, 'has not met the others')")
    assert (code, said) == (1, "repvgg (process 7): has not met the others\n")


def test_while_it_is_limited_a_request_is_met_at_once() -> None:
    code, _ = run("guard.GRACE = 1000; watch.limit(1000, 'late')", signal.SIGTERM)
    assert code == 143


def test_it_ends_with_the_process_that_started_it() -> None:
    script = textwrap.dedent(DEAF).format(before="watch.free()")
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {script!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        process.kill()
        _, said = process.communicate(timeout=60)  # the end of the pipe: the orphan held it too
    assert said == f"repvgg (process 7): the process that started this one ({process.pid}) is gone\n"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(orphan, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_it_leaves_nothing_behind() -> None:
    from repvgg.train.guard import Guard

    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with Guard("repvgg"):
        pass
    after = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(after)
    assert before == after
