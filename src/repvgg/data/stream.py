"""Data sets that are read from front to back, near or far: hf-stream:NAME_OR_PATH and wds:SHARDS (WebDataset), by `datasets`.

The main process reads, in an order that is a function of seed and epoch: shards are shuffled, then examples within a
buffer. Workers decode. So any number of workers gives the same run, and a run goes on in the middle of an epoch by reading past
what it has seen. Several processes share the shards out where their number divides; else each reads all and takes its part.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from repvgg.data import DataError, Source
from repvgg.data.cache import kept
from repvgg.data.hf import VALIDATION_SPLITS, columns, refuse_ids
from repvgg.data.images import decode
from repvgg.disk import describe
from repvgg.models.manifest import Preprocessing

BLOCK = 512  # bytes; a tar file ends in blocks of zeros
BUFFER = 4096  # examples that are shuffled among each other


class Example(NamedTuple):
    """An encoded image that the main process hands to a worker. position: in the epoch's order, of this process."""

    position: int
    data: bytes
    name: str
    label: int


class Stream:
    """One split. Its keys are `Example`s, in the order that `order` reads them."""

    def __init__(self, name: str, table: Any, image: str, label: str, count: int) -> None:
        self.name, self.table, self.image, self.label, self.count = name, table, image, label, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, example: Example) -> tuple[Tensor, int]:
        return decode(example.data, name=example.name), example.label

    def limited(self, count: int, seed: int) -> "Stream":
        """`count` examples, drawn with the seed."""
        table = self.table.shuffle(seed=seed, buffer_size=BUFFER).take(count)
        return Stream(self.name, table, self.image, self.label, min(count, self.count))

    def order(self, seed: int, rank: int, processes: int, first: int, last: int) -> Iterator[Example]:
        """Yield the examples from `first` to `last` of one process's part; over again from its start if it has fewer."""
        shuffled = self.table.shuffle(seed=seed, buffer_size=BUFFER)
        own = split_dataset_by_node(shuffled, rank, processes)
        position = first
        for example in self._examples(own.skip(first)):
            if position == last:
                return
            yield example._replace(position=position)
            position += 1
        while position < last:  # shards of unequal size
            before = position
            for example in self._examples(own):
                if position == last:
                    return
                yield example._replace(position=position)
                position += 1
            if position == before:
                raise DataError(f"{self.name}: process {rank} has no images: there are too few shards for {processes} processes")

    def in_order(self, rank: int = 0, processes: int = 1) -> Iterator[Example]:
        """Yield all of them once, every n-th for each of n processes."""
        return islice(self._examples(self.table), rank, None, processes)

    def _examples(self, table: Any) -> Iterator[Example]:
        try:
            for i, row in enumerate(table):
                cell = row[self.image] or {"bytes": None, "path": None}
                data = cell["bytes"] if cell["bytes"] is not None else b""
                yield Example(i, data, f"{row.get('__url__', self.name)}: {cell['path'] or i}", int(row[self.label]))
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # of whatever protocol and file format is beneath
            raise DataError(f"{self.name}: cannot be read on ({describe(error)})") from None


def open_stream(name: str) -> Source:
    """Open a data set of the hub, or a local folder of parquet, without a copy on the disk."""
    return _open(f"hf-stream:{name}", {"path": name}, [])


def open_wds(spec: str) -> Source:
    """WebDataset shards of images with a .cls each: a folder with train-*.tar and val-*.tar, or TRAIN;VAL, paths or URLs in
    which {000..146} stands for numbers."""
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
    return _open(f"wds:{spec}", {"path": "webdataset", "data_files": {"train": train, "val": val}}, [*train, *val])


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


def _open(name: str, load: dict[str, Any], shards: list[str]) -> Source:
    try:
        splits = datasets.load_dataset(**load, streaming=True)
        held_out = next((s for s in VALIDATION_SPLITS if s in splits), None)
        if "train" not in splits or held_out is None:
            raise DataError(f"{name}: needs a train split and one of {', '.join(VALIDATION_SPLITS)}; it has {', '.join(splits)}")
        features = splits["train"].features or splits["train"]._resolve_features().features
        image, label, classes = columns(name, features)
        tables = {s: splits[s].cast_column(image, datasets.Image(decode=False)) for s in ("train", held_out)}
        counts = {s: _counted(name, s, table, label, shards) for s, table in tables.items()}
    except DataError:
        raise
    except Exception as error:  # the library raises many types; each is a reason in words
        raise DataError(f"{name}: cannot be opened ({describe(error).splitlines()[0]})") from None
    found = max(len(count) for count in counts.values())
    classes = classes or [str(i) for i in range(found)]
    if found > len(classes):
        raise DataError(f"{name}: label {found - 1}, but there are {len(classes)} classes")
    unseen = [i for i, n in enumerate(counts[held_out].tolist()) if n and (i >= len(counts["train"]) or not counts["train"][i])]
    if unseen:
        raise DataError(f"{name}: class {classes[unseen[0]]!r} has no images to train on")
    train, val = (Stream(f"{name}, {s}", tables[s], image, label, int(counts[s].sum())) for s in ("train", held_out))
    return Source(name, train, val, classes, Preprocessing())


def _counted(name: str, split: str, table: Any, label: str, shards: list[str]) -> Any:
    """Count the images of each class: one pass over all of it, kept for as long as the local files do not change."""
    stamps = [f"{s} {Path(s).stat().st_size} {Path(s).stat().st_mtime_ns}" for s in shards if "://" not in s]

    def count() -> dict[str, Any]:
        labels = [row[label] for row in table.select_columns([label])]
        if not labels or None in labels or min(labels) < 0:
            what = "no images" if not labels else "images without a label" if None in labels else f"label {min(labels)}"
            raise DataError(f"{name}, {split}: holds {what}")
        refuse_ids(f"{name}, {split}", label, set(labels))
        return {"counts": np.bincount(labels)}

    if not shards:  # a hub's data set or a folder of parquet: nothing here says whether it has changed
        return count()["counts"]
    return kept(["counts", name, split, *shards, *stamps], lambda found: True, count)["counts"]
