"""Read WebDataset's tars within bounds: `datasets` would unpack, decode and allocate whatever a stranger's tar asks for."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.packaged_modules.webdataset import webdataset
from datasets.utils.file_utils import ArchiveIterable

from repvgg.data import DataError
from repvgg.terminal import printable

LARGEST = 1 << 28  # bytes of one member


def members(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and files of a tar. Raises `DataError` for a compressed one or a sparse member, which have any size."""
    shard = printable(str(getattr(file, "name", "a shard")))
    try:
        tar = tarfile.open(fileobj=file, mode="r|")  # noqa: SIM115 - its file is closed by who opened it
    except tarfile.ReadError:
        raise DataError(f"{shard}: is no plain tar: if it is compressed, unpack it") from None
    for member in tar:
        if member.isreg() and not Path(member.name).name.startswith((".", "__")):
            if member.issparse() or member.size > LARGEST:
                raise DataError(f"{shard}: its {printable(member.name)} is sparse, or larger than {LARGEST:,} bytes: take it out")
            yield member.name, tar.extractfile(member)
        tar.members = []  # type: ignore[attr-defined]  # which would keep them all


def _refused(file: Any) -> Iterator[tuple[str, Any]]:
    raise DataError("a shard is a zip archive, no tar")


def bounded() -> None:
    """Have `datasets` read tars by `members`, decompress nothing in them, and decode nothing but numbers."""
    ArchiveIterable._iter_tar, ArchiveIterable._iter_zip = staticmethod(members), staticmethod(_refused)
    webdataset.EXTENSION_TO_COMPRESSION_FS_FILE_CLS = {}
    webdataset.WebDataset.DECODERS = dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int)
