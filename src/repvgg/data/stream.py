"""Data sets that are read from front to back, near or far: hf-stream:NAME_OR_PATH and wds:SHARDS (WebDataset), by `datasets`.

The order of an epoch is a function of its seed: shards are shuffled and put in a row, of which each process has an equal stretch. A
stretch is cut into lanes (at most `LANES`), read side by side by the worker processes, batches from each in turn; `CHUNK` images in
a row are shuffled among each other. So any number of workers gives the same run, every image is read once by one process, and a
run goes on in the middle of an epoch without reading more than the shards that it is in.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.utils.file_utils import xopen
from torch import Tensor

from repvgg.data import DataError, Source, tars
from repvgg.data.hf import HELD_OUT, columns, refuse_ids
from repvgg.data.images import decode
from repvgg.data.index import Counts, Index
from repvgg.disk import Log, describe, in_a_line
from repvgg.models.manifest import Preprocessing

BLOCK = 512  # bytes; a tar file ends in blocks of zeros
LANES = 16  # at most; each starts in the midst of a shard, which it reads from the front
CHUNK = 512  # images
CHANGED = "it has changed since it was counted: repvgg index counts it again"


class Example(NamedTuple):
    """An encoded image on its way to a transform. position: in the epoch's order, of all processes."""

    position: int
    data: bytes
    name: str
    label: int


class Piece(NamedTuple):
    """Rows of one shard, by rising numbers. position: of the first one in the epoch's order."""

    shard: int
    rows: Sequence[int]
    position: int = 0


@dataclass(frozen=True)
class Plan:
    """The batches of one process in one epoch, whose sizes take turns: batch j comes from lane j modulo their number.

    first: the batch to begin with; seed: None to shuffle nothing.
    """

    stream: "Stream"
    lanes: list[list[Piece]]
    sizes: Sequence[int]
    first: int
    batches: int
    seed: int | None = None

    def size(self, batch: int) -> int:
        """Return how many images a batch has; the very last may have fewer."""
        return self.sizes[batch % len(self.sizes)]

    def examples(self, lane: int) -> Iterator[Example]:
        """Yield what a lane holds, from the first batch on."""
        pieces, chunk = self.lanes[lane], 1 if self.seed is None else CHUNK
        past = sum(self.size(batch) for batch in range(lane, self.first, len(self.lanes)))
        number, past = divmod(past, chunk)
        examples = self.stream.read(cut(pieces, number * chunk, _length(pieces)))
        while some := list(islice(examples, chunk)):
            if self.seed is not None:
                order = np.random.default_rng([self.seed, lane, number]).permutation(len(some))
                some = [some[i] for i in order]
            yield from some[past:]
            number, past = number + 1, 0


class Stream:
    """One split. Its keys are `Example`s. sizes: how many images each shard holds. classes: how many there are."""

    def __init__(self, name: str, table: Any, image: str, label: str, sizes: Sequence[int], classes: int) -> None:
        self.name, self.table, self.image, self.label, self.classes = name, table, image, label, classes
        self.pieces = [Piece(shard, range(size)) for shard, size in enumerate(sizes)]

    def __len__(self) -> int:
        return _length(self.pieces)

    def __getitem__(self, example: Example) -> tuple[Tensor, int]:
        return decode(example.data, name=example.name), example.label

    def limited(self, count: int, seed: int) -> "Stream":
        """Return the stream of `count` examples, drawn with the seed."""
        drawn = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        few = Stream(self.name, self.table, self.image, self.label, [], self.classes)
        ends = np.cumsum([len(piece.rows) for piece in self.pieces])
        for piece, end in zip(self.pieces, ends, strict=True):
            own = drawn[(drawn >= end - len(piece.rows)) & (drawn < end)] - (end - len(piece.rows))
            few.pieces.append(Piece(piece.shard, [piece.rows[int(i)] for i in own]))
        return few

    def shuffled(self, seed: int, start: int, sizes: Sequence[int], batches: int, first: int = 0) -> Plan:
        """Return one process's batches of an epoch, whose stretch begins at `start`; their sizes take turns."""
        order = np.random.default_rng(seed).permutation(len(self.pieces))
        stop = start + sum(islice(cycle(sizes), batches))
        own = cut(_placed([self.pieces[i] for i in order]), start, stop)
        return Plan(self, _lanes(own, sizes, batches), sizes, first, batches, seed)

    def in_order(self, rank: int, processes: int, size: int) -> Plan:
        """Return one process's batches of all images, the last of which may be smaller."""
        edges = [len(self) * i // processes for i in (rank, rank + 1)]
        own = cut(_placed(self.pieces), *edges)
        batches = -(-_length(own) // size)
        return Plan(self, _lanes(own, [size], batches), [size], 0, batches)

    def read(self, pieces: Sequence[Piece]) -> Iterator[Example]:
        """Yield the examples of pieces. Raises `DataError` for what cannot be read, or has changed since it was counted."""
        for shard, rows, position in pieces:
            if not rows:
                continue
            left = iter(rows)
            wanted = next(left)
            table = self.table.shard(self.table.num_shards, shard)
            for number, example in self._rows(table.skip(wanted) if wanted else table, wanted, position):
                if number == wanted:
                    if not 0 <= example.label < self.classes:
                        raise DataError(f"{self.name}, shard {shard}: image {number} has the label {example.label}; {CHANGED}")
                    yield example._replace(position=position)
                    position, wanted = position + 1, next(left, -1)
                    if wanted < 0:
                        break
            if wanted >= 0:
                raise DataError(f"{self.name}, shard {shard}: ends before image {wanted}; {CHANGED}")

    def _rows(self, table: Any, first: int, position: int) -> Iterator[tuple[int, Example]]:
        try:
            for number, row in enumerate(table, first):
                cell = row[self.image] or {"bytes": None, "path": None}
                data = fetched(cell)
                name = f"{row.get(tars.SHARD, self.name)}: {row.get(tars.FILE) or cell['path'] or number}"
                yield number, Example(position, data, name, int(row[self.label]))
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # of whatever protocol and file format is beneath
            raise DataError(f"{self.name}: cannot be read on ({describe(error)})") from None


def fetched(cell: dict[str, Any] | None) -> bytes:
    """Return an encoded image, which may be a file of its own, near or far; one that is missing is no image."""
    if cell and cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if not cell or not cell["path"]:
        return b""
    if "://" not in cell["path"] and not Path(cell["path"]).is_file():  # a stranger's device or pipe would never end
        return b""
    with xopen(cell["path"], "rb") as file:
        return bytes(file.read())


def cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """Return the stretch from `start` to `stop` of pieces in a row."""
    found, before = [], 0
    for shard, rows, position in pieces:
        first, last = max(0, start - before), min(len(rows), stop - before)
        if first < last:
            found.append(Piece(shard, rows[first:last], position + first))
        before += len(rows)
    return found


def _length(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.rows) for piece in pieces)


def _placed(pieces: Sequence[Piece]) -> list[Piece]:
    """Return pieces with their positions in this row."""
    ends = accumulate((len(piece.rows) for piece in pieces), initial=0)
    return [piece._replace(position=start) for piece, start in zip(pieces, ends, strict=False)]


def _lanes(pieces: list[Piece], sizes: Sequence[int], batches: int) -> list[list[Piece]]:
    """Cut a stretch into lanes of whole batches, of which the very last may be smaller."""
    count = max(1, min(LANES, len(pieces) // 2, batches))
    lengths = [0] * count
    for batch, size in zip(range(batches), cycle(sizes), strict=False):
        lengths[batch % count] += size
    lengths[(batches - 1) % count] -= sum(lengths) - _length(pieces)
    ends = list(accumulate(lengths, initial=0))
    return [cut(pieces, start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True)
class Opened:
    """A stream's tables by split, the names of its columns and classes, and where its index is."""

    name: str
    tables: dict[str, Any]
    image: str
    label: str
    classes: list[str] | None
    index: Index


def open_stream(name: str) -> Source:
    """Open a data set of the hub, or a local folder of parquet, without a copy on the disk."""
    return _source(_of_hub(name))


def open_wds(spec: str) -> Source:
    """WebDataset shards of images with a .cls each: a folder with train-*.tar and val-*.tar, or TRAIN;VAL, paths or URLs in
    which {000..146} stands for numbers."""
    return _source(_of_tars(spec))


def write_index(spec: str, workers: int = 0, log: Log = print) -> Path:
    """Count the images of a stream's shards, and return the file in which they are written down.

    Raises `DataError` for data that are no stream, or cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("wds", "hf-stream") or not rest:
        raise DataError(f"{spec}: only wds: and hf-stream: have an index; other data need none")
    opened = _of_tars(rest) if kind == "wds" else _of_hub(rest)
    return opened.index.make(opened.tables, opened.label, workers, log)


def _of_hub(name: str) -> Opened:
    folder = Path(name) if Path(name).is_dir() else None
    files = sorted(folder.rglob("*.parquet")) if folder else []
    return _opened(f"hf-stream:{name}", lambda: datasets.load_dataset(name, streaming=True), folder, files)


def _of_tars(spec: str) -> Opened:
    root = Path(spec)
    if ";" not in spec and not root.is_dir():
        raise DataError(
            f"wds:{spec}: no such folder; or name the shards of both splits, as in 'wds:train-{{000..146}}.tar;val-000.tar'"
        )
    patterns = spec.split(";") if ";" in spec else []
    train = expanded(patterns[0]) if patterns else sorted(map(str, root.glob("train*.tar")))
    val = expanded(patterns[1]) if patterns else sorted(map(str, root.glob("val*.tar")))
    for what, shards in (("train", train), ("val", val)):
        if not shards:
            raise DataError(f"wds:{spec}: has no {what}*.tar")
        refuse_damaged(f"wds:{spec}", shards)
    local = [Path(shard) for shard in (*train, *val) if "://" not in shard]
    folder = root if root.is_dir() else local[0].parent if local else None
    return _opened(f"wds:{spec}", lambda: {"train": tars.table(train), "val": tars.table(val)}, folder, local)


def refuse_damaged(name: str, shards: list[str]) -> None:
    """Raises `DataError` for a local shard that is missing, or cut off: where a member ends, nothing else would notice that."""
    for shard in (Path(shard) for shard in shards if "://" not in shard):
        if not shard.is_file():
            raise DataError(f"{name}: there is no {shard}")
        if shard.suffix == ".tar":
            with shard.open("rb") as file:
                file.seek(max(0, shard.stat().st_size - BLOCK))
                if file.read() != bytes(BLOCK):
                    raise DataError(f"{name}: {shard} is damaged, it does not end as a tar file does: copy or download it again")


def expanded(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: a-{08..11}.tar for a-08.tar, a-09.tar, a-10.tar and a-11.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    low, high = found[1], found[2]
    numbers = (f"{i:0{len(low)}d}" for i in range(int(low), min(int(high), int(low) + 1_000_000) + 1))
    return [name for n in numbers for name in expanded(pattern[: found.start()] + n + pattern[found.end() :])]


def _opened(name: str, load: Callable[[], dict[str, Any]], folder: Path | None, files: Sequence[Path]) -> Opened:
    try:
        splits = load()
        held_out = next((s for s in HELD_OUT if s in splits), None)
        if "train" not in splits or held_out is None:
            raise DataError(f"{name}: needs a train split and one of {', '.join(HELD_OUT)}; it has {', '.join(splits)}")
        features = splits["train"].features or splits["train"]._resolve_features().features
        image, label, classes = columns(name, features)
        tables = {s: splits[s].cast_column(image, datasets.Image(decode=False)) for s in ("train", held_out)}
    except DataError:
        raise
    except Exception as error:  # the library raises many types; each is a reason in words
        raise DataError(f"{name}: cannot be opened ({in_a_line(error)})") from None
    return Opened(name, tables, image, label, classes, Index(name, folder, files))


def _source(opened: Opened) -> Source:
    name, tables = opened.name, opened.tables
    try:
        counts = opened.index.counts(tables, opened.label)
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(f"{name}: cannot be opened ({in_a_line(error)})") from None
    classes = _classes(opened, counts)
    train, val = (
        Stream(f"{name}, {s}", tables[s], opened.image, opened.label, [sum(shard.values()) for shard in counts[s]], len(classes))
        for s in tables
    )
    return Source(name, train, val, classes, Preprocessing())


def _classes(opened: Opened, counts: Counts) -> list[str]:
    """Return the names of the classes. Raises `DataError` for labels that are none, or that training would not see."""
    labels = {split: {label for shard in shards for label in shard} for split, shards in counts.items()}
    for split, found in labels.items():
        if opened.classes is None:
            refuse_ids(f"{opened.name}, {split}", opened.label, found)
    largest = max(map(max, labels.values()))
    classes = opened.classes or [str(i) for i in range(largest + 1)]
    if largest >= len(classes):
        raise DataError(f"{opened.name}: label {largest}, but there are {len(classes)} classes")
    if unseen := sorted(set.union(*labels.values()) - labels["train"]):
        raise DataError(f"{opened.name}: class {classes[unseen[0]]!r} has no images to train on")
    return classes
