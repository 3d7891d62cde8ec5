"""Predictions for a whole data set, however large: read shard by shard, written as Parquet, shared out among processes.

    predict_data(Job("best.safetensors", "wds:photos", Path("preds.parquet"), engine="openvino"))

    OUT/part-00000.parquet         the predictions of one shard (see data/shards.py), whole or not there
    OUT/_settings.json             what they were made of and with; anything else is refused
    OUT/_masks/00000/000000.png    of a PSPNet: class ids; by shard, and number in the shard

Columns: `key`, `label` (null if the data has none), `labels` and `probabilities` (lists, the likeliest first), `error` (why an
image could not be read, else null). Of a PSPNet: `key`, `mask` (path in OUT), `error`.

A part that is there is not made again. Of n processes each takes every n-th shard; they need not know of each other, and there
may be more or fewer next time: which images run in one batch depends on the shard alone, so the predictions are the same.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import rgb_to_grayscale

from repvgg.data.images import ImageError, decode
from repvgg.data.shards import Item, Shards, open_shards
from repvgg.data.transforms import eval_transform, leave_signals_to_the_main_process, normalise
from repvgg.deploy.formats import exported_file
from repvgg.deploy.load import open_model
from repvgg.deploy.runner import Runner
from repvgg.disk import FileError, Log, atomically
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.load import file_of, is_file
from repvgg.models.names import PSPNETS
from repvgg.models.pspnet import PSPNet
from repvgg.models.views import WHOLE, Views
from repvgg.models.zoo import dtype_of, manifest_of
from repvgg.predict.labels import named
from repvgg.predict.masks import Masker, class_names, colours, write_mask
from repvgg.train.progress import PLAIN_EVERY

SETTINGS = "_settings.json"
FORMAT = 1
ROW_GROUP = 1000  # batches, at most


@dataclass(frozen=True)
class Job:
    """What `repvgg predict --data` is asked for; see its help. rank: of this process, of `processes`. Raises ValueError for what
    makes no sense."""

    model: str
    data: str
    out: Path
    split: str = "val"
    engine: str = ""
    precision: str = "fp32"
    batch_size: int = 32
    top: int = 5
    part_size: int = 1024
    views: Views = WHOLE
    device: str = "cpu"
    workers: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.top < 1:
            raise ValueError("--batch-size and --top are at least 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers}: at least 0")
        if not 0 <= self.rank < self.processes:
            raise ValueError(
                f"RANK={self.rank}, WORLD_SIZE={self.processes}: ranks are from 0 on and below the number of processes"
            )


@dataclass(frozen=True)
class Summary:
    """parts: those that are there, of `of`. images, errors: in them, those that could not be read too. here: images that this
    process predicted, in `seconds`."""

    out: Path
    parts: int
    of: int
    images: int
    errors: int
    here: int
    seconds: float

    @property
    def complete(self) -> bool:
        return self.parts == self.of


def predict_data(job: Job, log: Log = print) -> Summary:
    """Do this process's share of the parts that are not there yet.

    An image that cannot be read is counted and has its reason in the column `error`. Raises `DataError` for data that cannot be
    read on, `FileError` for a folder that cannot be written or holds predictions of something else, ValueError for a model or
    engine that does not fit.
    """
    shards = open_shards(job.data, job.split, job.part_size)
    network = _agreed(job, shards, log)
    maker = _maker(network, job)
    own = range(job.rank, shards.count, job.processes)
    missing = [shard for shard in own if not _part(job.out, shard).exists()]
    if shards.count < job.processes:
        log(f"{shards.count} shards for {job.processes} processes: some have nothing to do")
    if len(missing) < len(own):
        log(f"{len(own) - len(missing)} of {len(own)} parts are there: going on")
    with Meter(_images(shards, missing), log, live=job.rank == 0) as meter:
        images = _load(shards, missing, maker, job)
        for shard in missing:
            rows = _rows(images, maker, meter)
            atomically(_part(job.out, shard), partial(_write, schema=maker.schema, batches=rows))
    return _summary(job.out, shards.count, meter)


def _rows(images: Iterator["Loaded"], maker: "Labels | Masks", meter: "Meter") -> Iterator[pa.RecordBatch]:
    """Of one shard."""
    for loaded in images:
        rows = maker.rows(loaded)
        meter.add(len(rows))
        yield rows
        if loaded.batch.last:
            return


def _maker(network: nn.Module, job: Job) -> "Labels | Masks":
    if isinstance(network, PSPNet):
        return Masks(network, job.device, job.views, job.out)
    if job.views != WHOLE:
        raise ValueError("this model gives labels, not masks: --slide, --scales and --flip are for a PSPNet")
    return Labels(network, job.top, job.device)


class Labels:
    """The likeliest classes of images, as rows."""

    schema = pa.schema(
        {
            "key": pa.string(),
            "label": pa.string(),
            "labels": pa.list_(pa.string()),
            "probabilities": pa.list_(pa.float32()),
            "error": pa.string(),
        }
    )

    def __init__(self, network: nn.Module, top: int = 5, device: str = "cpu") -> None:
        manifest = manifest_of(network)
        if (manifest.arch or {}).get("name") in PSPNETS:
            raise ValueError("masks are made by PyTorch, from a model file: leave out --engine")
        self.preprocessing, self.classes = manifest.preprocessing, manifest.classes
        self.prepare = eval_transform(self.preprocessing)
        self.network = network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.top, self.device, self.dtype = top, device, dtype_of(network)

    def rows(self, images: "Loaded") -> pa.RecordBatch:
        """One for each image."""
        answers = iter(self._labels(images.pixels)) if images.pixels is not None else iter(())
        found = [None if error else next(answers) for error in images.errors]
        columns = {
            "key": [item.key for item in images.batch.items],
            "label": [self._name(item.label) for item in images.batch.items],
            "labels": [[name for name, _ in labels] if labels else None for labels in found],
            "probabilities": [[x for _, x in labels] if labels else None for labels in found],
            "error": images.errors,
        }
        return pa.RecordBatch.from_pydict(columns, schema=self.schema)

    @torch.inference_mode()
    def _labels(self, pixels: Tensor) -> list[list[tuple[str, float]]]:
        x = normalise(pixels.to(self.device), self.preprocessing)
        return named(self.network(x.to(self.dtype)).float().softmax(1).cpu(), self.classes, self.top)

    def _name(self, label: str | int | None) -> str | None:
        """A class that the data only numbers has the name that the model has for it."""
        if isinstance(label, int):
            return self.classes[label] if self.classes and label < len(self.classes) else str(label)
        return label


class Masks:
    """Masks of photos as files, and their paths as rows."""

    schema = pa.schema({"key": pa.string(), "mask": pa.string(), "error": pa.string()})

    def __init__(self, model: nn.Module, device: str, views: Views, out: Path) -> None:
        self.masker, self.palette, self.out = Masker(model, device, views), colours(class_names(model)), out
        self.preprocessing, self.prepare = self.masker.preprocessing, self.masker.to_network

    def rows(self, images: "Loaded") -> pa.RecordBatch:
        """One for each photo, of at most one: they differ in size."""
        masks: list[str | None] = [None] * len(images.batch.items)
        if images.pixels is not None:
            path = f"_masks/{images.batch.shard:05d}/{images.batch.start:06d}.png"
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            write_mask(self.masker(images.pixels[0], images.sizes[0]), self.palette, self.out / path)
            masks = [path]
        columns = {"key": [item.key for item in images.batch.items], "mask": masks, "error": images.errors}
        return pa.RecordBatch.from_pydict(columns, schema=self.schema)


# ------------------------------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class Batch:
    """Images of one shard, from its `start`-th on; a shard without images has one batch without images."""

    shard: int
    start: int
    last: bool
    items: list[Item]


@dataclass(frozen=True)
class Loaded:
    """A batch, decoded. errors: why an image could not be, or None. sizes, pixels: of those that could, uint8 [n, C, H, W]."""

    batch: Batch
    errors: list[str | None]
    sizes: list[tuple[int, int]]
    pixels: Tensor | None


class Decoder:
    """What worker processes do."""

    def __init__(self, prepare: nn.Module, channels: int) -> None:
        self.prepare, self.channels = prepare, channels

    def __getitem__(self, batch: Batch) -> Loaded:
        errors: list[str | None] = []
        sizes, pixels = [], []
        for item in batch.items:
            try:
                image = self._decoded(item)
                pixels.append(self.prepare(image))
                sizes.append((image.shape[1], image.shape[2]))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        without = replace(batch, items=[replace(item, image=b"") for item in batch.items])
        return Loaded(without, errors, sizes, torch.stack(pixels) if pixels else None)

    def _decoded(self, item: Item) -> Tensor:
        if not isinstance(item.image, Tensor):
            return decode(item.image, self.channels, name=item.key)
        if item.image.shape[0] == self.channels:
            return item.image
        return item.image.expand(3, -1, -1) if self.channels == 3 else rgb_to_grayscale(item.image)


def _load(shards: Shards, wanted: Sequence[int], maker: Labels | Masks, job: Job) -> Iterator[Loaded]:
    """The main process reads, workers decode."""
    images_at_once = 1 if isinstance(maker, Masks) else job.batch_size
    loader: Any = DataLoader(
        Decoder(maker.prepare, maker.preprocessing.input_size[0]),  # type: ignore[arg-type]
        batch_size=None,
        sampler=_batches(shards, wanted, images_at_once),
        num_workers=job.workers,
        collate_fn=_as_it_is,
        worker_init_fn=leave_signals_to_the_main_process if job.workers else None,
    )
    return iter(loader)


def _batches(shards: Shards, wanted: Iterable[int], size: int) -> Iterator[Batch]:
    for shard in wanted:
        items, start = iter(shards.read(shard)), 0
        batch = list(islice(items, size))
        while following := list(islice(items, size)):
            yield Batch(shard, start, False, batch)
            batch, start = following, start + size
        yield Batch(shard, start, True, batch)


def _as_it_is(loaded: Any) -> Any:
    return loaded


# ----------------------------------------------------------------------------------------------------------------- the folder


def _part(out: Path, shard: int) -> Path:
    return out / f"part-{shard:05d}.parquet"


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(batches, ROW_GROUP)):
            writer.write_table(pa.Table.from_batches(group, schema))


def _agreed(job: Job, shards: Shards, log: Log) -> nn.Module:
    """The model, folded, or an engine of it; the same for all processes that write to this folder, now and later.

    Whoever comes first writes down what the folder is for, and the fastest engine is its choice. Raises `FileError` for a folder
    that is for something else.
    """
    path = job.out / SETTINGS
    with _held(job.out):
        if not path.exists():
            network = _opened(job, job.engine, log)
            text = json.dumps(_settings(job, shards, network), indent=2) + "\n"
            atomically(path, lambda temporary: temporary.write_text(text))
            return network
    try:
        there = json.loads(path.read_text())
        engine = str(there["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{path}: is damaged: delete it together with the parts beside it") from None
    network = _opened(job, engine.removeprefix("pytorch") if job.engine == "auto" else job.engine, log)
    _refuse_another(job.out, there, _settings(job, shards, network))
    return network


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder, made if need be, while no other process has it."""
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in out.iterdir()}
            stack.enter_context(FileLock(out / ".lock"))
        except OSError as error:
            raise FileError(f"{out}: cannot be a folder of predictions ({error.strerror})") from None
        if SETTINGS not in names and any(not name.startswith((".", "_")) for name in names):
            raise FileError(f"{out}: is a folder of something else, it has no {SETTINGS}: give another --out")
        yield


def _opened(job: Job, engine: str, log: Log) -> nn.Module:
    network = open_model(job.model, engine, job.precision, job.batch_size, job.device, log)
    return network if isinstance(network, Runner) else reparameterize(network)


def _settings(job: Job, shards: Shards, network: nn.Module) -> dict[str, Any]:
    """Whatever the predictions depend on."""
    how = {"views": asdict(job.views)} if isinstance(network, PSPNet) else {"top": job.top}
    settings = {
        "format": FORMAT,
        "model": job.model,
        "model_sha256": _digest(job.model),
        "data": shards.name,
        "split": job.split,
        "data_fingerprint": shards.fingerprint,
        "part_size": shards.size,
        "engine": network.name if isinstance(network, Runner) else "pytorch",
        "precision": job.precision,
        **how,
    }
    return dict(json.loads(json.dumps(settings)))


def _refuse_another(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """What a model or a data set is called does not matter, only what is in it."""
    for what in ("format", "split", "part_size", "model", "data", "engine", "precision", "top", "views"):
        fact = {"model": "model_sha256", "data": "data_fingerprint"}.get(what, what)
        if there.get(fact) != here.get(fact):
            was, now = there.get(what), here.get(what)
            difference = f"{was}, not {now}" if was != now else f"{was}, which has changed since"
            raise FileError(f"{out}: was begun with the {what.replace('_', ' ')} {difference}: give another --out")


def _digest(model: str) -> str:
    """Of the file, and of the weights that some keep beside it; of what is no file, its name."""
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


def _images(shards: Shards, wanted: Sequence[int]) -> int | None:
    if shards.size is None or shards.images is None:
        return None
    return sum(min(shards.size, shards.images - shard * shards.size) for shard in wanted)


def _summary(out: Path, count: int, meter: "Meter") -> Summary:
    parts = [path for path in (_part(out, shard) for shard in range(count)) if path.exists()]
    images, errors = 0, 0
    for path in parts:
        try:
            footer = pq.read_metadata(path)
        except (OSError, ValueError):
            raise FileError(f"{path}: is damaged: delete it, and the same command makes it again") from None
        images += footer.num_rows
        for group in (footer.row_group(i) for i in range(footer.num_row_groups) if footer.num_rows):
            errors += group.num_rows - group.column(group.num_columns - 1).statistics.null_count
    if len(parts) == count:
        for leftover in out.glob(".part-*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    return Summary(out, len(parts), count, images, errors, meter.images, meter.seconds)


# ------------------------------------------------------------------------------------------------------------------- progress


class Meter:
    """Images and images a second: a live line in a terminal, plain lines elsewhere. total: None where it is not known."""

    def __init__(self, total: int | None, log: Log = print, live: bool = True) -> None:
        self.total, self.log, self.live = total, log, live
        self.images, self.seconds = 0, 0.0
        self.bar: Any = None

    def __enter__(self) -> "Meter":
        if self.live and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.total)
        self.started = self.spoke = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, images: int) -> None:
        self.images += images
        now = time.perf_counter()
        self.seconds = now - self.started
        speed = self.images / self.seconds
        if self.bar is not None:
            self.bar.update(self.task, completed=self.images, description=f"{speed:,.0f} img/s")
        elif now - self.spoke > PLAIN_EVERY:
            self.spoke = now
            left = f" of {self.total:,}, {(self.total - self.images) / speed / 60:.1f} min left" if self.total else ""
            self.log(f"{self.images:,} images{left}, {speed:,.0f} img/s")


# ------------------------------------------------------------------------------------------------------------ other frameworks


class Predictor:
    """A model for frameworks that move batches themselves, such as Ray Data: each of their workers makes one, and calls it.

        ray.data.read_binary_files("photos", include_paths=True).map_batches(Predictor, fn_constructor_args=["best.safetensors"])

    It is called with columns `bytes` (encoded images) and `path`, and gives the table that a part holds.
    """

    def __init__(self, model: str, engine: str = "", precision: str = "fp32", top: int = 5, device: str = "cpu") -> None:
        job = Job(model, "", Path(), engine=engine, precision=precision, top=top, device=device)
        self.labels = Labels(_opened(job, engine, print), top, device)
        self.decoder = Decoder(self.labels.prepare, self.labels.preprocessing.input_size[0])

    def __call__(self, columns: dict[str, Any]) -> pa.Table:
        items = [Item(str(path), None, bytes(data)) for path, data in zip(columns["path"], columns["bytes"], strict=True)]
        return pa.Table.from_batches([self.labels.rows(self.decoder[Batch(0, 0, True, items)])], Labels.schema)
