"""What this process may use of the machine, and which processor that is."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have NumPy's matrix products take one thread: where other processes compute too, OpenBLAS's threads wait for each other most
    of the time, and take ten times as long. Does nothing where NumPy has another library."""
    library = next((Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas*"), None)
    try:
        blas = ctypes.CDLL(str(library))
        threads, set_threads = blas.scipy_openblas_get_num_threads64_(), blas.scipy_openblas_set_num_threads64_
    except (OSError, AttributeError):
        yield
        return
    set_threads(1)
    try:
        yield
    finally:
        set_threads(threads)


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
