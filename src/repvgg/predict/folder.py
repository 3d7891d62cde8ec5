"""A folder of predictions: what it is for, its parts, and how far it is.

OUT/part-00000.parquet         the predictions of one shard (see data/shards.py), whole or not there
OUT/_settings.json             what they were made of and with; anything else is refused
OUT/_masks/00000/000000.png    of a model that gives masks: class ids; by shard, and number in the shard
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from repvgg.data.shards import Shards
from repvgg.deploy.formats import exported_file
from repvgg.disk import FileError, hold, make_folder
from repvgg.models.load import file_of, is_file
from repvgg.predict.job import Job

SETTINGS = "_settings.json"
FORMAT = 1
ROW_GROUP = 1000  # batches, at most


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other processes out of it. Raises `FileError` for a folder of something else."""
    make_folder(out, "a folder of predictions")
    try:
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise FileError(f"{out}: cannot be read ({error.strerror})") from None
    refuse_foreign(str(out), names)
    with hold(out):
        for leftover in out.glob(".part-*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        yield


def refuse_foreign(out: str, names: set[str]) -> None:
    """Raise `FileError` for a folder that holds something else than predictions."""
    if SETTINGS not in names and any(not name.startswith((".", "_")) for name in names):
        raise FileError(f"{out}: is a folder of something else, it has no {SETTINGS}: give another --out")


def parsed(text: str, path: str) -> dict[str, Any]:
    """Return the settings in a file. Raises `FileError` where it is damaged."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("engine"), str):
            return found
    raise FileError(f"{path}: is damaged: delete it together with the parts beside it")


def engine_of(job: Job, there: Mapping[str, Any] | None) -> str:
    """Return the engine to open: "auto" chooses once for a folder."""
    return str(there["engine"]).removeprefix("pytorch") if there and job.engine == "auto" else job.engine


def settings(job: Job, shards: Shards, engine: str, masks: bool) -> dict[str, Any]:
    """Return whatever the predictions depend on."""
    how = {"views": asdict(job.views)} if masks else {"top": job.top}
    found = {
        "format": FORMAT,
        "model": job.model,
        "model_sha256": _digest(job.model),
        "data": shards.name,
        "split": job.split,
        "data_fingerprint": shards.fingerprint,
        "part_size": shards.size,
        "engine": engine,
        "precision": job.precision,
        **how,
    }
    return dict(json.loads(json.dumps(found)))


def refuse_another(out: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `FileError` where a folder was begun with other settings.

    What a model or a data set is called does not matter, only what is in it.
    """
    for what in ("format", "split", "part_size", "model", "data", "engine", "precision", "top", "views", "runner"):
        fact = {"model": "model_sha256", "data": "data_fingerprint"}.get(what, what)
        if there.get(fact) != here.get(fact):
            was, now = there.get(what), here.get(what)
            difference = f"{was}, not {now}" if was != now else f"{was}, which has changed since"
            raise FileError(f"{out}: was begun with the {what.replace('_', ' ')} {difference}: give another --out")


def _digest(model: str) -> str:
    """Return the digest of a model's file and of the weights that some keep beside it; for what is no file, its name."""
    exported = exported_file(model)
    if exported is None and not is_file(model):
        return model
    file = exported or file_of(model)
    digest = hashlib.sha256()
    for path in dict.fromkeys((file, file.with_suffix(".bin"))):
        if path.is_file():
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------------- parts


def part(out: Path, shard: int) -> Path:
    """Return where the predictions of a shard lie."""
    return out / f"part-{shard:05d}.parquet"


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write batches of rows as one Parquet file."""
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(batches, ROW_GROUP)):
            writer.write_table(pa.Table.from_batches(group, schema))


def counted(paths: Sequence[str], filesystem: Any = None) -> tuple[int, int]:
    """Return the number of rows in parts, and of those with an error, from their footers. Raises `FileError` for a damaged one."""
    images, errors = 0, 0
    for path in paths:
        try:
            footer = pq.read_metadata(path, filesystem=filesystem)
        except (OSError, ValueError):
            raise FileError(f"{path}: is damaged: delete it, and the same command makes it again") from None
        images += footer.num_rows
        for group in (footer.row_group(i) for i in range(footer.num_row_groups) if footer.num_rows):
            errors += group.num_rows - group.column(group.num_columns - 1).statistics.null_count
    return images, errors
