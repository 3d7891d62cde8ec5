"""The memory that a step frees is kept for the next one, which need not wait for it then.

glibc hands large blocks back to the system as soon as they are free, and the system clears each page that it gives out again.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST = 32 << 20  # bytes: glibc takes larger blocks from the system whatever it is told
NEVER = 2**31 - 1


@contextmanager
def kept_heap() -> Iterator[None]:
    """Let this process keep the memory that it frees; in the end it is given back. Without glibc nothing is done."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows; macOS, musl
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, 2 * LARGEST)  # what glibc comes to by itself once a block of that size was freed
        malloc_trim(0)
