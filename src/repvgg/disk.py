"""Files written whole or not at all, the cache folder, how errors of files are told, and which files are images."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

STALE = 600  # seconds: a process on another machine may be writing to a shared folder
UNREAD = {".heic", ".heif", ".avif"}  # photos that may not be read here: they are listed, so that none is left out in silence
IMAGES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", *UNREAD}  # by suffix
# How folders of programs begin: .ipynb_checkpoints, __MACOSX, `repvgg predict --data`'s masks, a NAS's thumbnails, a disk's own.
LEFT_BEHIND = (".", "__", "_masks", "@eaDir", "lost+found")
EVIDENCE = ".cam.png"  # how pictures are named that `repvgg predict --explain cam` makes of images
TEMPORARY = re.compile(r"\.(.+)\.(\d+)(-[0-9a-f]{8})?\.tmp", re.DOTALL)
LONGEST = 1 << 28  # characters of a text file that programs wrote
RAN_OUT = ("out of memory", "not enough memory", "allocate memory", "bad alloc", "bad_alloc", "failed to map segment")
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

    What a process that was killed left behind in writing the same file is taken away. Raises `FileError` for an OSError.
    """
    path = Path(path)
    short = path.name if len(os.fsencode(path.name)) < 220 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    # A name has 255 bytes at most. Containers that share a folder have the same few process numbers.
    temporary = path.with_name(f".{short}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write_to(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = f"there is no folder {path.parent}" if missing else error.strerror or describe(error)
        raise FileError(f"{path}: cannot be written ({reason})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sweep(path.parent, short)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all. Raises `FileError` as `atomically` does."""
    atomically(path, lambda temporary: temporary.write_text(text))


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file that a program wrote. Raises OSError where there is none, `FileError` for a device, a pipe and what
    is larger than any of ours: it may be a stranger's, and never end."""
    with open(plain_file(path, os.O_RDONLY), encoding="utf-8") as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise FileError(f"{path}: is larger than {LONGEST:,} bytes, and no file of ours")
    return text


def plain_file(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file of a folder that may be a stranger's, and return its descriptor: no device or pipe, and to write no link.

    Raises `FileError` for those, OSError as `os.open` does.
    """
    link = os.O_NOFOLLOW if flags & (os.O_WRONLY | os.O_RDWR) else 0
    try:
        descriptor = os.open(path, flags | link | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if link and error.errno == errno.ELOOP:
            raise FileError(f"{path}: is a link to another file, which would be lost: remove the link") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path}: is no file, but a device, a pipe or a folder: remove it")
    return descriptor


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file, or a folder's list of names, to disk: a file renamed in it is then there after a power cut."""
    folder = Path(path).is_dir()
    if folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str], what: str) -> None:
    """Make a folder and those above it. what: "a run folder", say, for the message. Raises `FileError` where it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be {what} ({error.strerror})") from None


def _sweep(folder: Path, name: str) -> None:
    """Take away temporary files of that name that nobody has touched for a while and whose process is gone."""
    for left in _left_behind(folder).get(name, ()):
        process = int(left.suffixes[-2][1:].partition("-")[0])
        with suppress(OSError):
            if not alive(process) and time.time() - left.stat().st_mtime > STALE:
                left.unlink()


@lru_cache(maxsize=256)
def _left_behind(folder: Path) -> dict[str, list[Path]]:
    """List a folder's temporary files by the names they are for; once, for it may hold very many files."""
    found = defaultdict[str, list[Path]](list)
    with suppress(OSError):
        for path in folder.iterdir():
            if ours := TEMPORARY.fullmatch(path.name):
                found[ours[1]].append(path)
    return found


def alive(process: int) -> bool:
    """Return whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


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
            while True:
                file = stack.enter_context(os.fdopen(plain_file(path, os.O_RDWR | os.O_CREAT), "r+"))
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(path.lstat(), os.fstat(file.fileno())):
                    break  # else its last holder has just removed it
            file.truncate(0)
            file.write(here)
            file.flush()
        except BlockingIOError:
            raise FileError(f"{folder}: {file.read(300)} works in it: wait for it, or name another folder") from None
        except OSError as error:
            raise FileError(f"{folder}: cannot be locked ({error.strerror})") from None
        _held.add(path)
        stack.callback(_held.discard, path)
        stack.callback(path.unlink, missing_ok=True)
        yield


def escaped(name: str) -> str:
    """Return a file name, or what was made of one, as printable text; `unescaped` undoes it.

    File names are bytes: what is no UTF-8 in them, and what would move a terminal's cursor, becomes \\xNN, and a backslash two.
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in _bytes(c)) for c in name.replace("\\", "\\\\"))


def _bytes(character: str) -> bytes:
    return os.fsencode(character) if "\udc80" <= character <= "\udcff" else character.encode("utf-8", "surrogatepass")


def unescaped(text: str) -> str:
    """Return the file name that `escaped` made `text` of."""
    if "\\" not in text:
        return text
    found = re.split(rb"(\\\\|\\x[0-9a-f]{2})", text.encode())
    parts = [b"\\" if part == b"\\\\" else bytes([int(part[2:], 16)]) if part[:2] == b"\\x" else part for part in found]
    return os.fsdecode(b"".join(parts))


def full(folder: str | os.PathLike[str]) -> bool:
    """Return whether a disk is full, or so nearly that whatever was written last may have been cut short."""
    return shutil.disk_usage(folder).free < 64 * 1024


def describe(error: BaseException) -> str:
    """Tell an error of somebody else's code in a few words."""
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)[:200] or type(error).__name__


def in_a_line(error: BaseException) -> str:
    """Tell such an error in its first line."""
    return (describe(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error, of whatever library, means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(words in text for words in RAN_OUT)


def cache_folder() -> Path:
    """Return the folder for what took long to find out: ~/.cache/repvgg (XDG_CACHE_HOME is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repvgg"


def walked(
    root: str | os.PathLike[str], above: str | os.PathLike[str] = "", seen: Callable[[str], object] = str
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a root, itself first, with the names of its files. Links to folders are followed, but none back to
    where it was come from.

    above: a folder that it was come from. seen: hears of each folder before that is read. Raises `FileError` for a folder that
    cannot be read.
    """
    root = os.fspath(root)
    inside = {root: {os.path.realpath(root), os.path.realpath(above or root)}}
    seen(root)
    for folder, folders, files in os.walk(root, onerror=_unread, followlinks=True):
        way = inside.pop(folder)
        for name in list(folders):
            real = os.path.realpath(path := os.path.join(folder, name))  # noqa: PTH118 - there may be millions
            if real in way or name.startswith(LEFT_BEHIND):
                folders.remove(name)
            else:
                seen(path)
                inside[path] = way | {real}
        yield folder, files


def _unread(error: OSError) -> None:
    raise FileError(f"{error.filename}: cannot be read ({error.strerror})") from None


def images_below(root: str | os.PathLike[str]) -> list[str]:
    """Return the paths of the images below a folder, relative to it, sorted. Raises `FileError` as `walked` does."""
    return sorted(
        path
        for folder, files in walked(root)
        for name in files
        if is_image(path := os.path.relpath(os.path.join(folder, name), root))  # noqa: PTH118
    )


def is_image(path: str | PurePath) -> bool:
    """Tell an image by its path below the folder that is walked: a suffix of `IMAGES`, and nobody's but the user's.

    Programs leave `LEFT_BEHIND` and hidden files (macOS a `._name` beside every file), `--explain cam` leaves `EVIDENCE`.
    """
    *folders, name = PurePath(path).parts
    own = not name.startswith(".") and not name.endswith(EVIDENCE) and not any(part.startswith(LEFT_BEHIND) for part in folders)
    return own and PurePath(name).suffix.lower() in IMAGES
