"""Facts about data sets that take long to find out, kept between runs in ~/.cache/repvgg (XDG_CACHE_HOME is honoured)."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from repvgg.disk import FileError, atomically, cache_folder

Arrays = dict[str, Any]
Finder = Callable[[Callable[[], Arrays]], Arrays]
_finder: ContextVar[Finder] = ContextVar("finder", default=lambda make: make())


@contextmanager
def found_by(finder: Finder) -> Iterator[None]:
    """Have `finder` find out what `once` is asked for: of many processes one does, and tells the others."""
    before = _finder.set(finder)
    try:
        yield
    finally:
        _finder.reset(before)


def once(make: Callable[[], Arrays]) -> Arrays:
    """Return what `make` finds out about a data set, here or in the process that does it for all."""
    return _finder.get()(make)


def kept(key: Sequence[str], fresh: Callable[[Arrays], bool], make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept under `key` if they are `fresh` still, else what `make` returns, which is then kept if it is.

    A cache that cannot be read or written costs time and nothing else.
    """
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(chr(0).join(key))).hexdigest()[:32]}.npz"
    with suppress(Exception), np.load(path, allow_pickle=False) as file:  # of zipfile and NumPy, where a bit has flipped
        found = {name: file[name] for name in file.files}
        if fresh(found):
            return found
    made = make()
    with suppress(OSError, FileError):
        if not fresh(made):
            return made
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda temporary: _save(temporary, made))
    return made


def _save(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


class Names:
    """Many strings in one block of bytes: a million take no time to copy, and worker processes share them."""

    def __init__(self, joined: Any, ends: Any) -> None:
        self.joined, self.ends = joined, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.joined[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())
