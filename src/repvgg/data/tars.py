"""Read WebDataset's tars within bounds: a stranger's tar asks for any memory, and what lies in it is not to be unpacked."""

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
from datasets.utils.file_utils import xopen

from repvgg.data import DataError
from repvgg.terminal import printable

LARGEST = 1 << 28  # bytes of one member
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset: what has the same path up to its first dot belongs together
LABEL, SHARD, KEY = "cls", "__url__", "__key__"
FILE = "__file__"  # and no "path" of the image: `datasets` would read a file of this machine that is called so
IMAGES = {"bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"}


def table(shards: list[str]) -> Any:
    """Return the samples of these tars, paths or URLs, as an iterable data set with a shard for each."""
    text = datasets.Value("string")
    features = {"image": datasets.Image(decode=False), LABEL: datasets.Value("int64"), SHARD: text, KEY: text, FILE: text}
    return datasets.IterableDataset.from_generator(samples, datasets.Features(features), {"shards": shards})


def samples(shards: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the image of each sample as it is encoded, and its class. Raises `DataError` for a class that is no number."""
    for shard in shards:
        with xopen(shard, "rb") as file:
            named = ((found, content) for name, content in members(file) if (found := SAMPLE.fullmatch(name)))
            for key, parts in groupby(named, key=lambda part: part[0][1]):
                sample: dict[str, Any] = {"image": None, LABEL: None, SHARD: shard, KEY: key, FILE: key}
                for found, content in parts:
                    suffix = found[2].lower()
                    if suffix in IMAGES:
                        sample |= {"image": {"bytes": content.read(), "path": None}, FILE: found[0]}
                    elif suffix == LABEL:
                        sample[LABEL] = _number(content.read(), f"{shard}: {key}")
                yield sample


def _number(text: bytes, name: str) -> int:
    if not re.fullmatch(rb"\s*-?\d{1,18}\s*", text):
        raise DataError(f"{printable(name)}: its .{LABEL} is no number")
    return int(text)


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
