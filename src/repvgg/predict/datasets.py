"""Predictions for a whole data set, however large: read shard by shard, written as Parquet.

    predict_data(Job("best.safetensors", "wds:photos", "preds.parquet", engine="openvino"))

Columns: `key`, `label` (null if the data has none), `labels` and `probabilities` (lists, the likeliest first), `error` (why an
image could not be read, else null). Of a model that gives masks: `key`, `mask` (path in OUT), `error`.

A part that is there is not made again, so that the same command goes on where it was. One process works in a folder (folder.py);
predict/cluster.py does the same on many machines.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from torch import nn

from repvgg.data.shards import Shards
from repvgg.deploy.load import open_model
from repvgg.deploy.runner import Runner
from repvgg.disk import FileError, Log, atomically, read_text, write_text
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.zoo import manifest_of
from repvgg.predict import folder
from repvgg.predict.job import Job, Summary
from repvgg.predict.loading import Loaded, load
from repvgg.predict.remote import open_data
from repvgg.predict.rows import Labels, Masks
from repvgg.terminal import Progress
from repvgg.train.tasks import task_of_model


def predict_data(job: Job, log: Log = print) -> Summary:
    """Make the parts that are not there yet.

    An image that cannot be read is counted and has its reason in the column `error`. Raises `DataError` for data that cannot be
    read on, `FileError` for a folder that cannot be written, in which another process works or which holds predictions of something
    else, ValueError for a model or engine that does not fit.
    """
    if "://" in job.out:
        raise ValueError(f"--out {job.out}: an object store is written by --ray, or name a folder")
    out = Path(job.out)
    shards = open_data(job.data, job.split, job.part_size)
    with folder.held(out):
        network = _agreed(job, out, shards, log)
        images_at_once = 1 if manifest_of(network).task == "masks" else job.batch_size
        made = maker(network, job, partial(_save, out))
        missing = [shard for shard in range(shards.count) if not folder.part(out, shard).exists()]
        if len(missing) < shards.count:
            log(f"{shards.count - len(missing)} of {shards.count} parts are there: going on")
        with Progress(_images(shards, missing), log) as progress:
            images = load(shards, missing, made.decoder, images_at_once, job.workers)
            for shard in missing:
                rows = _rows(images, made, progress)
                atomically(folder.part(out, shard), partial(folder.write, schema=made.schema, batches=rows))
        counts = folder.counted([str(folder.part(out, shard)) for shard in range(shards.count)])
        return Summary(job.out, shards.count, *counts, progress.done, progress.seconds)


def opened(job: Job, engine: str, log: Log) -> nn.Module:
    """Return the model of a job, folded, or an engine of it."""
    network = open_model(job.model, engine, job.precision, job.batch_size, job.device, log)
    return network if isinstance(network, Runner) else reparameterize(network)


def engine_name(network: nn.Module) -> str:
    """Return the name of what runs a model, as a folder's settings have it."""
    return network.name if isinstance(network, Runner) else "pytorch"


def maker(network: nn.Module, job: Job, save: Callable[[str, bytes], object]) -> Labels | Masks:
    """Return what makes rows of images with this model. Raises ValueError for views that it cannot be shown."""
    task_of_model(network).check_views(job.views)
    if manifest_of(network).task == "masks":
        return Masks(network, job.device, job.views, save)
    return Labels(network, job.top, job.device)


def _agreed(job: Job, out: Path, shards: Shards, log: Log) -> nn.Module:
    """Return the model that this folder is for; write down what it is for where nothing is.

    Raises `FileError` for a folder that is for something else.
    """
    path = out / folder.SETTINGS
    try:
        there = folder.parsed(read_text(path), str(path)) if path.exists() else None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    network = opened(job, folder.engine_of(job, there), log)
    here = folder.settings(job, shards, engine_name(network), manifest_of(network).task == "masks")
    if there is None:
        write_text(path, json.dumps(here, indent=2) + "\n")
    else:
        folder.refuse_another(job.out, there, here)
    return network


def _save(out: Path, path: str, data: bytes) -> None:
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    atomically(out / path, lambda temporary: temporary.write_bytes(data))


def _rows(images: Iterator[Loaded], made: Labels | Masks, progress: Progress) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one shard."""
    for loaded in images:
        rows = made.rows(loaded)
        progress.add(len(rows), lambda: f"{progress.done / max(progress.seconds, 1e-9):,.0f} img/s", "images")
        yield rows
        if loaded.batch.last:
            return


def _images(shards: Shards, wanted: Sequence[int]) -> int | None:
    """Return how many images the wanted shards hold, None where only reading tells."""
    if shards.size is None or shards.images is None:
        return None
    return sum(min(shards.size, shards.images - shard * shards.size) for shard in wanted)
