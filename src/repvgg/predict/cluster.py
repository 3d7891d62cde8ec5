"""The predictions of datasets.py, made by Ray Data on one machine or many.

    predict_on_ray(Job("best.safetensors", "s3://bucket/photos", "s3://bucket/preds"), Cluster("auto"))

Shards are read in tasks, images decoded in others, and run by a pool of actors, which grows and shrinks; rows are the same. What
was done is kept by Ray Data's checkpoint, in OUT/_checkpoint: the same command goes on where the last was killed. All keys that are
done are held in memory by each of its filters: above some 100 million rows, predict the data in pieces, with a folder each.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import torch
from torch import Tensor

from repvgg.data import DataError
from repvgg.data.shards import Item, Shards
from repvgg.disk import FileError, Log, atomically, describe
from repvgg.models.zoo import manifest_of
from repvgg.predict import folder
from repvgg.predict.datasets import engine_name, maker, opened
from repvgg.predict.job import Job, Summary
from repvgg.predict.loading import Batch, Decoder, Loaded
from repvgg.predict.remote import filesystem, is_url, open_data
from repvgg.predict.where import Cluster

CHECKPOINT, DONE = "_checkpoint", "_done.json"
BLOCK_ROWS, BLOCK_BYTES = 256, 16 * 2**20  # of what a read task gives at once, at most
LIGHT = 0.25  # of a processor, which is what tasks need that read and write
FEW = 3  # processors
READ_TASKS = 2000  # at most: each reads several shards where there are more
READ = pa.schema(
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
PIXELS = pa.schema(
    [
        *(field for field in READ if field.name not in ("image", "path")),
        pa.field("error", pa.string()),
        pa.field("pixels", pa.large_binary()),
        pa.field("shape", pa.list_(pa.int32())),
        pa.field("size", pa.list_(pa.int32())),
    ]
)


def predict_on_ray(job: Job, cluster: Cluster, log: Log = print) -> Summary:
    """Make the predictions that are not there yet.

    Raises what `predict_data` does, and ValueError for a cluster that cannot be reached.
    """
    store, root = _place(job.out)
    shards = open_data(job.data, job.split, job.part_size)
    local = isinstance(store, pyarrow.fs.LocalFileSystem)
    with folder.held(Path(root)) if local else nullcontext():
        if not local:
            folder.refuse_foreign(job.out, {name.split("/")[0] for name in _names(store, root)})
        engine, decoder, schema = _agreed(job, shards, store, root, log)
        if done := _read(store, f"{root}/{DONE}"):
            return Summary(job.out, **json.loads(done), here=0, seconds=0.0)
        started, before = time.perf_counter(), _counts(store, root)[1]
        if before:
            log(f"{before:,} images are done: going on")
        _connect(cluster, log)
        _run(job, cluster, engine, decoder, schema, (store, root), shards.count)
        parts, images, errors = _counts(store, root)
        counts = {"parts": parts, "images": images, "errors": errors}
        _write(store, f"{root}/{DONE}", json.dumps(counts).encode())
        store.delete_dir(f"{root}/{CHECKPOINT}")
        return Summary(job.out, **counts, here=images - before, seconds=time.perf_counter() - started)


def _run(job: Job, cluster: Cluster, engine: str, decoder: Decoder, schema: pa.Schema, out: tuple[Any, str], count: int) -> None:
    """Run the pipeline. Raises ValueError with the reason of a task that failed."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    store, root = out
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = os.isatty(2)
    url = f"{root}/{CHECKPOINT}"
    context.checkpoint_config = CheckpointConfig("key", url, override_filesystem=store, delete_checkpoint_on_success=False)
    processors = int(ray.cluster_resources().get("CPU", 1))
    least, most = cluster.actors(processors)
    at_once = max(1, processors // 2)  # tasks that read, and that write: each is a process, which takes seconds to start
    share = 1 if processors > FEW else 0.5  # the checkpoint's filter takes a processor too, and reading must not starve
    try:
        tasks = min(count, READ_TASKS)
        images = ray.data.read_datasource(_source(job, count), override_num_blocks=tasks, concurrency=at_once, num_cpus=LIGHT)
        decoded = images.map_batches(partial(_decode, decoder), batch_size=job.batch_size, batch_format="pyarrow")
        rows = decoded.map_batches(
            Predictor,
            fn_constructor_args=[job, engine, out],
            batch_size=job.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            num_gpus=cluster.gpus or None,
            num_cpus=None if cluster.gpus else share,
        )
        rows.write_parquet(
            root,
            filesystem=store,
            min_rows_per_file=job.part_size,
            schema=schema,
            ray_remote_args={"num_cpus": LIGHT},
            concurrency=at_once,
        )
    except ray.exceptions.RayError as error:
        raise ValueError(f"the prediction stopped, the same command goes on ({_reason(error)})") from None
    finally:
        context.checkpoint_config = None


def _reason(error: BaseException) -> str:
    """Return the first line of what a task raised, from within Ray's wrappings."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return describe(error).strip().splitlines()[0]


def _connect(cluster: Cluster, log: Log) -> None:
    """Join a cluster, or start one of this machine. Raises ValueError where that cannot be."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # before it is imported; what goes wrong is said in one line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    cluster.actors(1)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=cluster.ray, **quiet)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        if cluster.ray != "auto":
            raise ValueError(f"--ray {cluster.ray}: no cluster answers there ({describe(error).splitlines()[0]})") from None
        ray.init(include_dashboard=False, num_cpus=max(2, os.cpu_count() or 1), **quiet)
    log(f"Ray {ray.__version__}: {ray.cluster_resources().get('CPU', 0):.0f} processors, {len(ray.nodes())} nodes")


# -------------------------------------------------------------------------------------------------------------- the pipeline


def _source(job: Job, count: int) -> Any:
    """Return what Ray Data reads: rows of `READ`, some shards a task."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Source(Datasource):
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            pieces = np.array_split(np.arange(count), min(count, parallelism))
            about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
            return [ReadTask(partial(_blocks, job, [int(n) for n in piece]), about, schema=READ) for piece in pieces]

        def estimate_inmemory_data_size(self) -> None:
            return None

    return Source()


_opened_here = lru_cache(1)(open_data)  # by a process that reads, once


def _blocks(job: Job, wanted: list[int]) -> Iterator[pa.Table]:
    """Yield the images of shards as tables of `READ`, each of a bounded size."""
    shards = _opened_here(job.data, job.split, job.part_size)
    rows: list[dict[str, Any]] = []
    held = 0
    for shard in wanted:
        for number, item in enumerate(shards.read(shard)):
            row = _row(item, shard, number)
            rows.append(row)
            held += len(row["image"] or b"")
            if len(rows) == BLOCK_ROWS or held > BLOCK_BYTES:
                yield pa.Table.from_pylist(rows, schema=READ)
                rows, held = [], 0
    yield pa.Table.from_pylist(rows, schema=READ)


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


def _decode(decoder: Decoder, images: pa.Table) -> pa.Table:
    """Return the pixels of images that could be decoded, as a table of `PIXELS`, and the errors of the others."""
    rows = []
    for row in images.to_pylist():
        image, path = row.pop("image"), row.pop("path")
        item = Item(row["key"], None, os.fsdecode(path) if image is None else image)
        loaded = decoder[Batch(row["shard"], row["start"], True, [item])]
        pixels = None if loaded.pixels is None else loaded.pixels[0]
        row["error"] = loaded.errors[0]
        row["pixels"] = None if pixels is None else pixels.numpy().tobytes()
        row["shape"] = None if pixels is None else list(pixels.shape)
        row["size"] = None if pixels is None else list(loaded.sizes[0])
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PIXELS)


class Predictor:
    """A model, opened once by each actor; called with tables of `PIXELS`, it returns rows of predictions."""

    def __init__(self, job: Job, engine: str, out: tuple[Any, str]) -> None:
        store, root = out

        def save(path: str, data: bytes) -> None:
            store.create_dir(os.path.dirname(f"{root}/{path}"), recursive=True)  # noqa: PTH120 - of any file system
            _write(store, f"{root}/{path}", data)

        network = opened(job, engine, str)
        self.one_by_one = manifest_of(network).task == "masks"
        self.made = maker(network, job, save)

    def __call__(self, images: pa.Table) -> pa.Table:
        rows = images.to_pylist()
        together = [[row] for row in rows] if self.one_by_one else [rows]
        return pa.Table.from_batches([self.made.rows(_loaded(some)) for some in together], self.made.schema)


def _loaded(rows: list[dict[str, Any]]) -> Loaded:
    items = [Item(row["key"], row["number"] if row["label"] is None else row["label"], b"") for row in rows]
    good = [row for row in rows if row["error"] is None]
    pixels = [torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(row["shape"]) for row in good]
    batch = Batch(rows[0]["shard"], rows[0]["start"], True, items)
    sizes = [(row["size"][0], row["size"][1]) for row in good]
    return Loaded(batch, [row["error"] for row in rows], sizes, torch.stack(pixels) if pixels else None)


# ----------------------------------------------------------------------------------------------------------------- the folder


def _agreed(job: Job, shards: Shards, store: Any, root: str, log: Log) -> tuple[str, Decoder, pa.Schema]:
    """Return the engine, the decoder and the columns of this folder; write down what it is for where nothing is.

    Raises `FileError` for a folder that is for something else.
    """
    path = f"{root}/{folder.SETTINGS}"
    found = _read(store, path)
    there = None if found is None else folder.parsed(found.decode(errors="replace"), path)
    network = opened(job, folder.engine_of(job, there), log)
    made = maker(network, job, lambda *_: None)
    here = {**folder.settings(job, shards, engine_name(network), manifest_of(network).task == "masks"), "runner": "ray"}
    if there is None:
        _write(store, path, (json.dumps(here, indent=2) + "\n").encode())
    else:
        folder.refuse_another(job.out, there, here)
    return engine_name(network).removeprefix("pytorch"), made.decoder, made.schema


def _place(out: str) -> tuple[Any, str]:
    """Return the file system and the path of a folder. Raises ValueError where Ray is missing."""
    if missing := [name for name in ("ray", "pandas") if find_spec(name) is None]:
        raise ValueError(f"--ray needs {', '.join(missing)}: pip install 'ray[data]' pyarrow")
    return filesystem(out) if is_url(out) else (pyarrow.fs.LocalFileSystem(), str(Path(out).resolve()))


def _names(store: Any, root: str) -> list[str]:
    """Return the paths below a folder. Raises `DataError` where it cannot be reached."""
    try:
        found = store.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise DataError(f"{root}: cannot be reached ({describe(error).splitlines()[0]})") from None
    return [file.path[len(root) :].lstrip("/") for file in found if file.type == pyarrow.fs.FileType.File]


def _counts(store: Any, root: str) -> tuple[int, int, int]:
    """Return how many parts are committed, the rows in them, and those with an error."""
    names = _names(store, root)
    pending = tuple(name.split("/")[-1].removesuffix(".pending.parquet") for name in names if name.endswith(".pending.parquet"))
    parts = [name for name in names if name.endswith(".parquet") and not name.startswith(("_", ".", *pending))]
    return len(parts), *folder.counted([f"{root}/{name}" for name in parts], store)


def _read(store: Any, path: str) -> bytes | None:
    try:
        with store.open_input_stream(path) as opened_file:
            return bytes(opened_file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({describe(error).splitlines()[0]})") from None


def _write(store: Any, path: str, data: bytes) -> None:
    """Write a file, whole or not at all; object stores know it no other way."""
    if isinstance(store, pyarrow.fs.LocalFileSystem):
        return atomically(path, lambda temporary: temporary.write_bytes(data))
    try:
        with store.open_output_stream(path) as opened_file:
            opened_file.write(data)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({describe(error).splitlines()[0]})") from None
