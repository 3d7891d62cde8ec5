"""Files written whole or not at all, the cache folder, and how errors of files are told."""

import os
from collections.abc import Callable
from contextlib import suppress
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


def describe(error: BaseException) -> str:
    """Tell an error of somebody else's code in a few words."""
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)[:200] or type(error).__name__


def cache_folder() -> Path:
    """Return the folder for what took long to find out: ~/.cache/repvgg (XDG_CACHE_HOME is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repvgg"
