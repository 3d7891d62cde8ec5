"""Commands run as processes that need not load PyTorch first: forks of one that has it.

    with Forks() as run:
        ended = run(["info", "repvgg_a0"], folder)          # as `repvgg info repvgg_a0` in that folder; ended.code, .out, .err
        with run.start(["train", ...], folder) as command:  # one that goes on meanwhile; command.pid, .said(), .poll(), .wait()
            ...

Each command is a process of its own all the same, with its own signals, memory and exit code. With a shim (tests/faults/shim.c)
it also has faults of its own.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
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
STRICTLY = "import warnings; warnings.simplefilter('error')"


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


class Started:
    """A command that runs. Leaving the context kills it, if it still does."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], job: dict[str, Any]) -> None:
        self._ask = ask
        self._place = tempfile.TemporaryDirectory()
        self._folder = Path(self._place.name)
        for name in ("out", "err", "calls"):
            (self._folder / name).touch()
        self._code: int | None = None
        self.pid = int(self._ask({**job, "place": self._place.name}))

    def said(self) -> str:
        """Return what it has written on stderr so far."""
        return (self._folder / "err").read_text(errors="replace")

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal, or None while it runs."""
        if self._code is None:
            self._code = self._ask({"pid": self.pid})
        return self._code

    def wait(self, seconds: float = 600) -> Ended:
        """Return how it ended, once it has. Raises TimeoutError where that takes longer."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"it still runs after {seconds:g} s; it has said:\n{self.said()}")
            time.sleep(0.002)
        calls = (self._folder / "calls").read_text()  # nothing without a shim, or from a command that was killed
        return Ended(code, int(calls or 0), (self._folder / "out").read_text(errors="replace"), self.said())

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self._place.cleanup()


class Forks:
    """The process that has PyTorch loaded, and forks one for each command."""

    def __init__(self, shim: Path | None = None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if shim is not None:
            self._environment["LD_PRELOAD"] = str(shim)
        self._process = self._started()

    def __call__(self, words: list[str], folder: Path, fault: Fault = Fault(), memory: int = 0) -> Ended:
        """Run `repvgg WORDS` in the folder; with `memory`, in at most so many bytes more than are taken already."""
        with Started(self._send, _job(folder, words=words, fault=vars(fault), memory=memory)) as command:
            return command.wait()

    def python(self, code: str, folder: Path) -> Ended:
        """Run a program in the folder; a warning is an error."""
        with Started(self._send, _job(folder, code=f"{STRICTLY}\n{code}")) as program:
            return program.wait()

    def start(self, what: list[str] | str, folder: Path, environment: dict[str, str] | None = None) -> Started:
        """Start `repvgg WORDS`, or a program, in the folder, with these variables besides; it leads a process group."""
        job = {"words": what} if isinstance(what, list) else {"code": what}
        return Started(self._send, _job(folder, environment=environment or {}, **job))

    def script(self, file: str, words: list[str], folder: Path) -> Started:
        """Start `python FILE WORDS` in the folder; it may import what this process may."""
        run = f"runpy.run_path({file!r}, run_name='__main__')"
        return self.start(f"import runpy, sys; sys.path, sys.argv = {sys.path!r}, {[file, *words]!r}; {run}", folder)

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, __file__]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment)

    def _send(self, job: dict[str, Any]) -> Any:
        if self._process.poll() is not None:
            self._process = self._started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the process that forks ended with {self._process.wait()}; the next command starts another")
        return json.loads(answer)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process, contextlib.suppress(BrokenPipeError):  # a job that it did not live to read
            self._process.kill()
            self._process.communicate()


def _job(folder: Path, **what: Any) -> dict[str, Any]:
    return {"folder": str(folder), "fault": vars(Fault()), "memory": 0, "environment": {}, **what}


# ------------------------------------------------------------------------------------------------------- in that process


def _serve() -> None:
    import torch

    from repvgg import create_model, reparameterize
    from repvgg.data import open_source

    torch.set_num_threads(1)
    if "LD_PRELOAD" not in os.environ:  # the faults' own, for which a drawing is a file like others
        session: Any = importlib.import_module("repvgg.train.session")
        session.draw_curve = lambda lines, path: path.touch()  # as in conftest.py
    reparameterize(create_model("repvgg_micro", num_classes=2, width=0.25).eval())
    open_source("digits")
    for module in LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_ended_with(job["pid"]) if "pid" in job else _forked(job)), flush=True)


def _ended_with(process: int) -> int | None:
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _forked(job: dict[str, Any]) -> int:
    process = os.fork()
    if process == 0:
        try:
            _child(job, Path(job["place"]))
        finally:
            os._exit(70)
    return process


def _child(job: dict[str, Any], place: Path) -> None:
    os.setpgid(0, 0)  # a command that kills its group kills itself alone
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and none reads the next one's job
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(place / name, os.O_WRONLY), number)
    os.chdir(job["folder"])
    os.environ |= job["environment"]
    counted = os.open(place / "calls", os.O_WRONLY)
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
    if job["memory"]:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + job["memory"], resource.RLIM_INFINITY))
    fault = Fault(**job["fault"])
    if shim is not None:
        shim.fault_arm(fault.under.encode(), ctypes.c_long(fault.at), fault.error, int(fault.on))
    code = _exit_code(partial(_program, job["code"]) if "code" in job else partial(_command, job["words"]))
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
    exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})


def _exit_code(run: Callable[[], None]) -> int:
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
