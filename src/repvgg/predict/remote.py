"""Data in object stores, as shards: Parquet files, or images, below a URL such as s3://bucket/photos."""

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs
import pyarrow.parquet as pq

from repvgg.data import DataError
from repvgg.data.hf import find_columns
from repvgg.data.shards import Item, Shards, open_shards
from repvgg.data.stores import filesystem, is_url
from repvgg.disk import in_a_line, is_image

ROWS = 64  # of a Parquet file, read at once


def open_data(data: str, split: str, size: int) -> Shards:
    """Return the shards of a URL, or of whatever else names data to predict. Raises `DataError` where it cannot be read."""
    if is_url(data) and split != "val":
        raise DataError(f"--split {split}: all that is below {data} is predicted, it has no splits")
    return open_url(data, size) if is_url(data) else open_shards(data, split, size)


def open_url(url: str, size: int) -> Shards:
    """Return the images below a URL as shards: a Parquet file each, or `size` image files each.

    Keys are paths below the URL, of Parquet followed by the number of the row; the label of an image file is the folder that it is
    in. Raises `DataError` where there is nothing, or it cannot be reached.
    """
    if size < 1:
        raise DataError(f"--part-size {size}: at least 1")
    store, root = filesystem(url)
    try:
        found = store.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except Exception as error:
        raise _unreadable(url, error) from None
    sizes = {str(PurePosixPath(f.path).relative_to(root)): f.size for f in found if f.type == pyarrow.fs.FileType.File}
    tables = sorted(name for name in sizes if name.endswith(".parquet"))
    images = sorted(filter(is_image, sizes))
    if not tables and not images:
        raise DataError(f"{url}: holds neither Parquet files nor images")
    names = tables or images
    fingerprint = hashlib.sha256(repr([(name, sizes[name]) for name in names]).encode()).hexdigest()[:16]
    if tables:
        return Shards(url, len(tables), lambda shard: _rows(store, root, tables[shard]), fingerprint)

    def files(shard: int) -> Iterator[Item]:
        for name in images[shard * size : (shard + 1) * size]:
            folder = PurePosixPath(name).parent.name or None
            yield Item(name, folder, _fetched(store, f"{root}/{name}"))

    return Shards(url, -(-len(images) // size), files, fingerprint, size, len(images))


def _rows(store: Any, root: str, name: str) -> Iterator[Item]:
    from datasets import Features

    try:
        with store.open_input_file(f"{root}/{name}") as opened:
            file = pq.ParquetFile(opened)
            features = Features.from_arrow_schema(file.schema_arrow)
            image, label, classes = find_columns(features)
            image = image or next((column for column in ("image", "bytes") if column in features), None)
            if image is None:
                raise DataError(f"{name}: has no column of images; it has {', '.join(features)}")
            number = 0
            for batch in file.iter_batches(ROWS, columns=[image, *([label] if label else [])]):
                for row in batch.to_pylist():
                    yield Item(f"{name}/{number}", _label(row[label] if label else None, classes), _encoded(row[image]))
                    number += 1
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from None


def _label(number: Any, classes: list[str] | None) -> str | int | None:
    if not isinstance(number, int) or number < 0:
        return number if isinstance(number, str) else None
    return classes[number] if classes and number < len(classes) else number


def _encoded(cell: Any) -> bytes:
    """Return an image's bytes; those of one that is missing, which is no image."""
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    return found if isinstance(found, bytes) else b""


def _fetched(store: Any, path: str) -> bytes:
    """Return a file's bytes; of one that is gone, nothing, which is no image. Raises `DataError` where the store fails."""
    try:
        with store.open_input_stream(path) as opened:
            return bytes(opened.read())
    except FileNotFoundError:
        return b""
    except Exception as error:  # of the network or the store: a row would say for good that it is no image
        raise _unreadable(path, error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    """Return the error to raise for whatever a store raises: those of fsspec have kinds of their own."""
    return DataError(f"{name}: cannot be read ({in_a_line(error)})")
