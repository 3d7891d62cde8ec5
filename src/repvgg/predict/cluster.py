"""The predictions of datasets.py, made by Ray Data on one machine or many.

    predict_on_ray(Job("best.safetensors", "s3://bucket/photos", "s3://bucket/preds"), Cluster("auto"))

Tasks read shards, a pool of actors that grows and shrinks decodes images and runs the model, and the process that started them
writes parts; rows are those of the plain loop. A part is whole or not there, so that the parts say what is done: the same command
leaves out the images that have a row. All machines keep 16 bytes of each of these: above some billion rows, predict the data in
pieces, with a folder each.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from repvgg.data.shards import Item, Shards
from repvgg.disk import Log
from repvgg.models.zoo import manifest_of
from repvgg.predict import folder, reading
from repvgg.predict.actors import Cluster
from repvgg.predict.connect import absolute, connect, reason_of, refuse_without_ray
from repvgg.predict.datasets import engine_name, maker, opened
from repvgg.predict.job import Job, Summary
from repvgg.predict.loading import Batch, Decoder, Loaded
from repvgg.predict.remote import open_data
from repvgg.predict.store import Store, name_of
from repvgg.terminal import Progress

DONE = "_done.json"
PIXELS = pa.schema(
    [
        *(field for field in reading.ROWS if field.name not in ("image", "path")),
        pa.field("error", pa.string()),
        pa.field("pixels", pa.large_binary()),
        pa.field("shape", pa.list_(pa.int32())),
        pa.field("size", pa.list_(pa.int32())),
    ]
)


def predict_on_ray(job: Job, cluster: Cluster, log: Log = print) -> Summary:
    """Make the predictions that are not there yet.

    Raises what `predict_data` does, and ValueError where Ray is missing or a cluster cannot be reached.
    """
    refuse_without_ray()
    cluster.actors(1)
    job = replace(job, model=absolute(job.model), data=absolute(job.data))
    store, shards = Store.of(job.out), open_data(job.data, job.split, job.part_size)
    with folder.held(Path(store.root)) if store.local else nullcontext():
        if not store.local:
            folder.refuse_foreign(job.out, {name.split("/")[0] for name in store.names()})
        engine, decoder, schema = _agreed(job, shards, store, log)
        if done := store.read(DONE):
            return Summary(job.out, **json.loads(done), here=0, seconds=0.0)
        before = store.done()
        if len(before):
            log(f"{len(before):,} images are done: going on")
        connect(cluster.ray, log)
        started = time.perf_counter()
        left = None if shards.images is None else shards.images - len(before)
        with Progress(left, log) as progress:
            for part in _parts(job, cluster, engine, decoder, store, shards.count, before):
                _write(store, part.cast(schema))
                progress.add(len(part), lambda: f"{progress.done / max(progress.seconds, 1e-9):,.0f} img/s", "images")
        parts, images, errors = store.counts()
        counts = {"parts": parts, "images": images, "errors": errors}
        store.write(DONE, json.dumps(counts).encode())
        return Summary(job.out, **counts, here=images - len(before), seconds=time.perf_counter() - started)


def _parts(job: Job, cluster: Cluster, engine: str, decoder: Decoder, store: Store, count: int, before: Any) -> Iterator[pa.Table]:
    """Run the pipeline, and yield the rows of a part each. Raises ValueError with the reason of a task that failed."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # once it is imported
    ray.data.DataContext.get_current().enable_progress_bars = False
    far = replace(job, device="cuda" if cluster.gpus else "cpu")  # what an actor was given; this machine may have something else
    processors = int(ray.cluster_resources().get("CPU", 1))
    least, most = cluster.actors(processors)
    beside = max(1, processors // 2)  # tasks that read ask for no processor: actors may take them all, and these must not starve
    try:
        tasks = min(count, reading.READ_TASKS)
        source = reading.source(job, count, ray.put(before))
        images = ray.data.read_datasource(source, override_num_blocks=tasks, concurrency=beside, num_cpus=0)
        decoded = images.map_batches(partial(_decode, decoder), batch_size=job.batch_size, batch_format="pyarrow")
        rows = decoded.map_batches(
            Predictor,
            fn_constructor_args=[far, engine, store],
            batch_size=job.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            num_gpus=cluster.gpus or None,
            num_cpus=None if cluster.gpus else min(1, processors / least),
        )
        yield from rows.iter_batches(batch_size=job.part_size, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise ValueError(f"the prediction stopped, the same command goes on ({reason_of(error)})") from None


# -------------------------------------------------------------------------------------------------------------- the pipeline


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

    def __init__(self, job: Job, engine: str, store: Store) -> None:
        network = opened(job, engine, str)
        self.one_by_one = manifest_of(network).task == "masks"
        self.made = maker(network, job, store.write)

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


def _write(store: Store, rows: pa.Table) -> None:
    """Write rows as a part."""
    data = pa.BufferOutputStream()
    pq.write_table(rows, data)
    store.write(name_of(rows["key"].to_pylist()), data.getvalue().to_pybytes())


def _agreed(job: Job, shards: Shards, store: Store, log: Log) -> tuple[str, Decoder, pa.Schema]:
    """Return the engine, the decoder and the columns of this folder; write down what it is for where nothing is.

    Raises `FileError` for a folder that is for something else.
    """
    found = store.read(folder.SETTINGS)
    there = None if found is None else folder.parsed(found.decode(errors="replace"), f"{store.root}/{folder.SETTINGS}")
    network = opened(job, folder.engine_of(job, there), log)
    made = maker(network, job, lambda *_: None)
    here = {**folder.settings(job, shards, engine_name(network), manifest_of(network).task == "masks"), "runner": "ray"}
    if there is None:
        store.write(folder.SETTINGS, (json.dumps(here, indent=2) + "\n").encode())
    else:
        folder.refuse_another(job.out, there, here)
    return engine_name(network).removeprefix("pytorch"), made.decoder, made.schema
