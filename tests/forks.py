"""Commands run as processes that need not load PyTorch first: forks of one that has it.

    with Forks() as run:
        ended = run(["info", "repvgg_a0"], folder)      # as `repvgg info repvgg_a0` in that folder; ended.code, .out, .err

Each command is a process of its own all the same, with its own signals, memory and exit code. With a shim (tests/faults/shim.c)
it also has faults of its own.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

LATE = (  # what commands import when they need it, and is slow to import
    "repvgg.deploy.export",
    "repvgg.train.loop",
    "onnxscript",
    "onnxruntime",
    "pyarrow.parquet",
    "torchvision.transforms.v2",
    "tensorboard.summary.writer.record_writer",
    "matplotlib.figure",
)


@dataclass(frozen=True)
class Fault:
    """The write, fsync or rename number `at` (from 1) below `under` fails with `error`, and all later ones if `on`."""

    under: str = ""
    at: int = 0
    error: int = 0
    on: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code`: negative for a signal. `calls`: its writes, fsyncs and renames."""

    code: int
    calls: int
    out: str
    err: str

    def in_a_line(self) -> bool:
        """Return whether it worked, or said in one line why not."""
        lines = [line for line in self.err.splitlines() if line.startswith("repvgg: ")]
        return "Traceback" not in self.err and (self.code == 0 or (self.code == 2 and len(lines) == 1))


class Forks:
    """The process that has PyTorch loaded, and forks one for each command."""

    def __init__(self, shim: Path | None = None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if shim is not None:
            self._environment["LD_PRELOAD"] = str(shim)
        self._process = self._started()

    def __call__(self, words: list[str], folder: Path, fault: Fault = Fault(), memory: int = 0) -> Ended:
        """Run `repvgg WORDS` in the folder; with `memory`, in at most so many bytes more than are taken already."""
        return self._send({"words": words, "folder": str(folder), "fault": vars(fault), "memory": memory})

    def python(self, code: str, folder: Path) -> Ended:
        """Run a program in the folder; a warning is an error."""
        return self._send({"code": code, "folder": str(folder), "fault": vars(Fault()), "memory": 0})

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, __file__]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment)

    def _send(self, job: dict[str, Any]) -> Ended:
        if self._process.poll() is not None:
            self._process = self._started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the process that forks ended with {self._process.wait()}; the next command starts another")
        return Ended(**json.loads(answer))

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process, contextlib.suppress(BrokenPipeError):  # a job that it did not live to read
            self._process.kill()
            self._process.communicate()


# ------------------------------------------------------------------------------------------------------- in that process


def _serve() -> None:
    import torch

    from repvgg import create_model, reparameterize
    from repvgg.data import open_source

    torch.set_num_threads(1)
    reparameterize(create_model("repvgg_micro", num_classes=2, width=0.25).eval())
    open_source("digits")
    for module in LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(_forked(json.loads(line), Path(place))), flush=True)


def _forked(job: dict[str, Any], place: Path) -> dict[str, Any]:
    for name in ("out", "err", "calls"):
        (place / name).touch()
    process = os.fork()
    if process == 0:
        try:
            _child(job, place)
        finally:
            os._exit(70)
    _, status = os.waitpid(process, 0)
    said = {name: (place / name).read_text(errors="replace") for name in ("out", "err")}
    calls = (place / "calls").read_text()  # nothing without a shim, or from a command that was killed
    return {"code": os.waitstatus_to_exitcode(status), "calls": int(calls or 0), **said}


def _child(job: dict[str, Any], place: Path) -> None:
    os.setpgid(0, 0)  # a command that kills its group kills itself alone
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and none reads the next one's job
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(place / name, os.O_WRONLY), number)
    os.chdir(job["folder"])
    counted = os.open(place / "calls", os.O_WRONLY)
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
    if job["memory"]:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + job["memory"], resource.RLIM_INFINITY))
    fault = Fault(**job["fault"])
    if shim is not None:
        shim.fault_arm(fault.under.encode(), ctypes.c_long(fault.at), fault.error, int(fault.on))
    code = _ended(partial(_program, job["code"]) if "code" in job else partial(_command, job["words"]))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if shim is not None:
        os.write(counted, str(shim.fault_calls()).encode())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _command(words: list[str]) -> None:
    from repvgg import cli

    sys.argv = ["repvgg", *words]
    cli.main(words)


def _program(code: str) -> None:
    warnings.simplefilter("error")
    exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})


def _ended(run: Callable[[], None]) -> int:
    """Return the exit code."""
    try:
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
