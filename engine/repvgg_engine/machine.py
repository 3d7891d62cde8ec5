"""What this process may use of the machine, and which processor that is."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_engine.library import LIBRARY

ROOT = Path("/")  # of the files that say what groups allow
CPUINFO, CACHES = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
# What tells processors of one family apart; brand names do not: an "AMD EPYC" may be a Zen 3 or a Zen 4.
IDENTITY = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part")


def available_threads() -> int:
    """Return how many threads can compute at once: processors of this process, no more than its container's quota of time."""
    return int(LIBRARY.repvgg_available_threads(os.fsencode(ROOT)))


def available_memory() -> int:
    """Return the machine's memory in bytes, or its container's limit where that is less."""
    return int(LIBRARY.repvgg_available_memory(os.fsencode(ROOT)))


class _Blas:
    """NumPy's library for matrix products, and how many want it to take one thread: the first to come notes how many threads it
    took, the last to go gives them back."""

    def __init__(self) -> None:
        self.lock, self.users, self.threads = threading.Lock(), 0, 0
        self.library: Any = None

    def enter(self, library: Any) -> None:
        with self.lock:
            if self.users == 0:
                self.library, self.threads = library, library.scipy_openblas_get_num_threads64_()
            library.scipy_openblas_set_num_threads64_(1)
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self.library.scipy_openblas_set_num_threads64_(self.threads)

    def forked(self) -> None:
        """Forget those who came in the parent process, and its lock: their threads are not here."""
        self.lock = threading.Lock()
        if self.users > 0:
            self.users = 1
            self.leave()


_BLAS = _Blas()
os.register_at_fork(after_in_child=_BLAS.forked)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have NumPy's matrix products take one thread: where other processes compute too, OpenBLAS's threads wait for each other most
    of the time, and take ten times as long. Does nothing where NumPy has another library."""
    try:
        library = ctypes.CDLL(str(next((Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas*"), None)))
        _BLAS.enter(library)
    except (OSError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        _BLAS.leave()


def return_memory() -> None:
    """Give back to the system what was freed, where the C library keeps it (glibc's does): weights need the room."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def processor() -> str:
    """Return what tells this kind of processor from others: vendor, family, model, and the sizes of its caches."""
    with suppress(OSError):
        first = CPUINFO.read_text().split("\n\n")[0]
        pairs = [[part.strip() for part in line.split(":", 1)] for line in first.splitlines() if ":" in line]
        known = [f"{name} {value}" for name, value in pairs if name in IDENTITY]
        caches = [path.read_text().strip() for path in sorted(CACHES.glob("index*/size"))]
        if known:
            return ", ".join([*known, *caches])
    return os.uname().machine
