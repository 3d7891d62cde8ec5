"""Several files that appear in a folder together, whole, or not at all."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repvgg.disk import FileError, alive, flush, full, in_a_line


@contextmanager
def staged(out: str | os.PathLike[str], ours: str = "") -> Iterator[Path]:
    """Yield a folder inside `out` whose files move to `out` when all went well, flushed to the disk, and are gone otherwise.

    ours: the file without which those of their names that `out` holds are somebody else's; "" for a folder of our own. What a
    killed process left of such folders is removed. Raises `FileError` where something else would be lost, and where they cannot be
    written, a full disk included, of which the libraries that write such files speak in many ways, or not at all.
    """
    out = Path(out)
    existed, mine = out.exists(), f".staged-{socket.gethostname()}-"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _sweep(out, mine)
        folder = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=out))
    except OSError as error:
        raise FileError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: file.suffix == ".json")  # what tells of the others comes last
        refuse_strangers(out, ours, *(file.name for file in files))
        for file in files:
            flush(file)
        for file in files:
            file.replace(out / file.name)
        flush(out)
    except (FileError, MemoryError):
        raise
    except OSError as error:
        raise FileError(f"{out}: cannot be written ({error.strerror or error})") from None
    except Exception:
        if full(folder):
            raise FileError(f"{out}: cannot be written ({os.strerror(errno.ENOSPC)})") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                out.rmdir()  # which does nothing unless it is empty


def refuse_strangers(out: str | os.PathLike[str], ours: str, *names: str) -> None:
    """Raise `FileError` for a folder with one of these files of somebody else's, which has no file called `ours` beside it."""
    if ours and not (Path(out) / ours).exists():
        for name in names:
            if os.path.lexists(Path(out) / name):
                raise FileError(f"{out}: holds the {name} of something else, which would be lost: name another folder")


def written(name: str, error: Exception) -> Exception:
    """Return what to raise where a runtime's library could not write its file: OSError as it is, anything else in one line."""
    if isinstance(error, (OSError, ValueError, MemoryError)):
        return error
    return ValueError(f"the {name} file cannot be written ({in_a_line(error)})")


def _sweep(out: Path, mine: str) -> None:
    """Remove the folders of processes of this machine that are no more."""
    for folder in out.glob(f"{mine}*"):
        pid = folder.name.removeprefix(mine).split("-")[0]
        if pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
