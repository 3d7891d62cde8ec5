"""A folder of predictions on a disk or in an object store, as every machine of a cluster sees it.

store = Store.of("s3://bucket/preds")
store.write("part-1.parquet", data)             # whole or not there
done = store.done()                             # which images have their row already
missing(done, ["cat/1.jpg", "cat/2.jpg"])       # [False, True]
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq

from repvgg.data import DataError
from repvgg.data.stores import filesystem, is_url
from repvgg.disk import FileError, atomically, in_a_line
from repvgg.predict import folder

DIGEST = 16  # bytes of a key: of a billion keys, two are alike once in 10^20 folders


@dataclass(frozen=True)
class Store:
    """A folder: a file system of pyarrow, and a path in it."""

    files: Any
    root: str

    @classmethod
    def of(cls, out: str) -> "Store":
        """Return the folder of that path or URL. Raises `DataError` for a URL that nothing here opens."""
        return cls(*filesystem(out)) if is_url(out) else cls(pyarrow.fs.LocalFileSystem(), str(Path(out).resolve()))

    @property
    def local(self) -> bool:
        """Say whether it is on a disk, which has locks, and can lose half a file."""
        return isinstance(self.files, pyarrow.fs.LocalFileSystem)

    def names(self) -> list[str]:
        """Return the paths of the files below it. Raises `DataError` where it cannot be reached."""
        try:
            found = self.files.get_file_info(pyarrow.fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        except OSError as error:
            raise DataError(f"{self.root}: cannot be reached ({in_a_line(error)})") from None
        return [file.path[len(self.root) :].lstrip("/") for file in found if file.type == pyarrow.fs.FileType.File]

    def parts(self) -> list[str]:
        """Return the full paths of the files of predictions."""
        return [f"{self.root}/{name}" for name in self.names() if name.endswith(".parquet") and name[0] not in "._"]

    def counts(self) -> tuple[int, int, int]:
        """Return how many parts there are, the rows in them, and those with an error. Raises `FileError` for a damaged one."""
        parts = self.parts()
        return len(parts), *folder.counted(parts, self.files)

    def done(self) -> Any:
        """Return the digests of the keys that have a row, sorted [rows]: 16 bytes each. Raises `FileError` for a damaged part."""
        found = [np.empty(0, f"S{DIGEST}")]
        for path in self.parts():
            try:
                found.append(_digests(pq.read_table(path, columns=["key"], filesystem=self.files)["key"].to_pylist()))
            except (OSError, ValueError):
                raise FileError(f"{path}: is damaged: delete it, and the same command makes it again") from None
        return np.sort(np.concatenate(found))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None where there is none. Raises `FileError` where it cannot be read."""
        path = f"{self.root}/{name}"
        try:
            with self.files.open_input_stream(path) as opened:
                return bytes(opened.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({in_a_line(error)})") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; object stores know it no other way. Raises `FileError` where that cannot be."""
        path = f"{self.root}/{name}"
        try:
            self.files.create_dir(str(PurePosixPath(path).parent), recursive=True)
            if self.local:
                return atomically(path, lambda temporary: temporary.write_bytes(data))
            with self.files.open_output_stream(path) as opened:
                opened.write(data)
        except OSError as error:
            raise FileError(f"{path}: cannot be written ({in_a_line(error)})") from None


def missing(done: Any, keys: Sequence[str]) -> Any:
    """Return which keys [n] are not among those of `Store.done`, bool [n]."""
    if not len(done):
        return np.ones(len(keys), bool)
    digests = _digests(keys)
    places = np.minimum(np.searchsorted(done, digests), len(done) - 1)
    return done[places] != digests


def name_of(keys: Iterable[str]) -> str:
    """Return the name of the part that holds these keys, in this order."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for key in keys:
        digest.update(key.encode() + b"\0")
    return f"part-{digest.hexdigest()}.parquet"


def _digests(keys: Sequence[str]) -> Any:
    return np.array([hashlib.blake2b(key.encode(), digest_size=DIGEST).digest() for key in keys], dtype=f"S{DIGEST}")
