"""What this process may use of the machine, and which processor that is."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CPUINFO, CACHES = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
# What tells processors of one family apart; brand names do not: an "AMD EPYC" may be a Zen 3 or a Zen 4.
IDENTITY = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part")


def available_threads() -> int:
    """Return how many threads can compute at once: processors of this process, no more than its container's quota of time."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([processors, *(int(quota) for quota in _quotas())]))


def available_memory() -> int:
    """Return the machine's memory in bytes, or its container's limit where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([memory, *_limits()])


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


def _quotas() -> Iterator[float]:
    """Yield processors' worth of time that each group above this process allows."""
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):  # version 2
            quota, period = map(int, (folder / "cpu.max").read_text().split())  # "max" is no number
            yield quota / period
        with suppress(OSError, ValueError):  # version 1, where -1 is no limit
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                yield quota / period


def _limits() -> Iterator[int]:
    """Yield bytes of memory that each group above this process allows."""
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                yield int((folder / name).read_text())


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of a controller's groups, from this process's own up to the root, for versions 1 and 2 of cgroups."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mounted = CGROUPS / controllers if controllers else CGROUPS
            own = mounted / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder == mounted or mounted in folder.parents)
