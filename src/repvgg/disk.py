"""Files written whole or not at all, the cache folder, and how errors of files are told."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

Log = Callable[[str], object]
"""Takes one line for a person to read: print, or what a test or a notebook puts in its place."""


class FileError(ValueError):
    """A model file that is missing, damaged, of another kind or hostile; the message names it and the remedy."""

    def __init__(self, message: str) -> None:
        # It quotes names from the file, which are a stranger's words: keep it to one printable line.
        printable = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(" ".join(printable.split())[:500])


def atomically(path: str | os.PathLike[str], write_to: Callable[[Path], Any]) -> None:
    """Call `write_to` with a temporary name in the same folder, flush it to disk, then rename: whoever reads sees all or nothing.

    Raises `FileError` for an OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = f"there is no folder {path.parent}" if missing else error.strerror
        raise FileError(f"{path}: cannot be written ({reason})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


_held: set[Path] = set()  # a process loses its lock on a file when it closes any handle of it, so none is opened twice


@contextmanager
def hold(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process out of a folder while the `with` block runs.

    The lock is the system's, on the file `.lock`: it ends with the process, however that dies, and processes forked from it do
    not inherit it. Raises `FileError`, naming the process and machine that hold the folder.
    """
    import fcntl

    path, here = Path(folder).resolve() / ".lock", f"process {os.getpid()} on {socket.gethostname()}"
    if path in _held:
        raise FileError(f"{folder}: {here}, which is this one, works in it already")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+"))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(here)
            file.flush()
        except BlockingIOError:
            raise FileError(f"{folder}: {path.read_text()[:300]} works in it: wait for it, or name another folder") from None
        except OSError as error:
            raise FileError(f"{folder}: cannot be locked ({error.strerror})") from None
        _held.add(path)
        stack.callback(_held.discard, path)
        yield


def describe(error: BaseException) -> str:
    """Tell an error of somebody else's code in a few words."""
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)[:200] or type(error).__name__


def cache_folder() -> Path:
    """Return the folder for what took long to find out: ~/.cache/repvgg (XDG_CACHE_HOME is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repvgg"
