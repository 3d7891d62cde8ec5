"""Tasks of Ray Data that read the images of a data set. They import little: each is a process more."""

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from repvgg.data.shards import Item
from repvgg.predict.job import Job
from repvgg.predict.remote import open_data
from repvgg.predict.store import missing

BLOCK_ROWS, BLOCK_BYTES = 256, 16 * 2**20  # of what a read task gives at once, at most
READ_TASKS = 2000  # at most: each reads several shards where there are more
ROWS = pa.schema(
    {
        "key": pa.string(),
        "label": pa.string(),
        "number": pa.int64(),  # of a label that the data only numbers
        "shard": pa.int64(),
        "start": pa.int64(),
        "image": pa.large_binary(),
        "path": pa.binary(),  # of an image that is a file
    }
)


def source(job: Job, count: int, before: Any) -> Any:
    """Return what Ray Data reads: rows of `ROWS`, some shards a task. before: reference to what is done."""
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def blocks(wanted: list[int]) -> Iterator[pa.Table]:
        return _blocks(job, wanted, ray.get(before))

    class Source(Datasource):
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            pieces = np.array_split(np.arange(count), min(count, parallelism))
            about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
            return [ReadTask(partial(blocks, [int(n) for n in piece]), about, schema=ROWS) for piece in pieces]

        def estimate_inmemory_data_size(self) -> None:
            return None

    return Source()


_opened_here = lru_cache(1)(open_data)  # by a process that reads, once


def _blocks(job: Job, wanted: list[int], before: Any) -> Iterator[pa.Table]:
    """Yield the images of shards that are not done, as tables of `ROWS`, each of a bounded size."""
    shards = _opened_here(job.data, job.split, job.part_size)
    rows: list[dict[str, Any]] = []
    held = 0
    for shard in wanted:
        for number, item in enumerate(shards.read(shard)):
            row = _row(item, shard, number)
            rows.append(row)
            held += len(row["image"] or b"")
            if len(rows) == BLOCK_ROWS or held > BLOCK_BYTES:
                yield _left(rows, before)
                rows, held = [], 0
    yield _left(rows, before)


def _left(rows: list[dict[str, Any]], before: Any) -> pa.Table:
    left = missing(before, [row["key"] for row in rows])
    return pa.Table.from_pylist([row for row, wanted in zip(rows, left, strict=True) if wanted], schema=ROWS)


def _row(item: Item, shard: int, start: int) -> dict[str, Any]:
    image = item.image
    return {
        "key": item.key,
        "label": item.label if isinstance(item.label, str) else None,
        "number": item.label if isinstance(item.label, int) else None,
        "shard": shard,
        "start": start,
        "image": _png(image) if isinstance(image, Tensor) else image if isinstance(image, bytes) else None,
        "path": os.fsencode(image) if isinstance(image, str) else None,
    }


def _png(pixels: Tensor) -> bytes:
    """Return pixels, uint8 [C, H, W], as an image file that loses nothing."""
    from torchvision.io import encode_png

    return bytes(encode_png(pixels.contiguous()).numpy().tobytes())
