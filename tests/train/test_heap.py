"""Memory that is freed stays with the process inside, and goes back to the system in the end."""

import ctypes
import subprocess
import sys

import pytest

from repvgg.train.heap import kept_heap

PROGRAM = """
import contextlib, sys
import psutil
from repvgg.train.heap import kept_heap

def held():
    return psutil.Process().memory_info().rss >> 20

before = held()
with kept_heap() if sys.argv[1] == "kept" else contextlib.nullcontext():
    blocks = [b"x" * (20 << 20) for _ in range(10)]
    full = held()
    del blocks
    print(full - before, held() - before)
print(held() - before)
"""


def has_glibc() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "mallopt")
    except (OSError, TypeError):
        return False


def megabytes(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not has_glibc(), reason="there is no glibc here")
def test_what_is_freed_stays_inside_and_goes_back_in_the_end() -> None:
    full, freed, after = megabytes("kept")
    assert full > 190
    assert freed > 190
    assert after < 50
    full, freed, _ = megabytes("plain")
    assert freed < 50 < 190 < full


def test_nothing_is_done_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with kept_heap():
        pass
