"""Count the images of each class in each shard of a stream, by one pass over all of it, and write that down.

    repvgg index wds:photos                     # writes photos/_index.json, which all machines that see the folder use

What has no folder here is kept in ~/.cache/repvgg. A set of few shards is counted when it is first opened; one of many asks for
the command, because the pass takes minutes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from repvgg.data import DataError
from repvgg.data.cache import Arrays, once
from repvgg.data.workers import leave_signals_to_the_main_process
from repvgg.disk import FileError, Log, cache_folder, read_text, write_text

FILE = "_index.json"
MANY = 64  # shards: fewer are counted without being asked

Counts = dict[str, list[dict[int, int]]]  # by split and shard, how many images of each label


@dataclass(frozen=True)
class Index:
    """The place of one data set's index. folder: where the data are, None if not here; files: of it, which must not change."""

    spec: str
    folder: Path | None
    files: Sequence[Path] = ()

    def known(self, tables: dict[str, Any]) -> Counts | None:
        """Return the counts that are written down, None where there are none of these files."""
        for path in self._paths():
            with suppress(OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
                found = json.loads(read_text(path))
                counts = _numbered({split: found["counts"][split] for split in tables})
                if found["files"] == self._stamps() and all(len(counts[s]) == t.num_shards for s, t in tables.items()):
                    return counts
        return None

    def counts(self, tables: dict[str, Any], label: str) -> Counts:
        """Return the counts that are written down, or make those of a small set; of many processes one does.

        Raises `DataError` where there are none of a large set, and for images without labels.
        """

        def find() -> Arrays:
            return {"json": np.frombuffer(json.dumps(self._counts(tables, label)).encode(), np.uint8)}

        return _numbered(json.loads(once(find)["json"].tobytes()))

    def _counts(self, tables: dict[str, Any], label: str) -> Counts:
        if (found := self.known(tables)) is not None:
            return found
        if (count := sum(table.num_shards for table in tables.values())) > MANY:
            raise DataError(f"{self.spec}: {count:,} shards and no index of them: repvgg index {self.spec}")
        made = self._made(tables, label, 0)
        with suppress(FileError, OSError):
            self._write(self._paths()[-1], made)
        return made

    def make(self, tables: dict[str, Any], label: str, workers: int, log: Log) -> Path:
        """Count, write it down beside the data if that can be, and return where.

        Raises `DataError` for images without labels, `FileError` where it cannot be written.
        """
        made = self._made(tables, label, workers)
        for split, shards in made.items():
            log(f"{split}: {sum(sum(shard.values()) for shard in shards):,} images in {len(shards):,} shards")
        *beside, cached = self._paths()
        for path in beside:
            with suppress(FileError):
                self._write(path, made)
                return path
        self._write(cached, made)
        return cached

    def _made(self, tables: dict[str, Any], label: str, workers: int) -> Counts:
        made = {split: _counted(table, label, workers) for split, table in tables.items()}
        for split, shards in made.items():
            labels = {label for shard in shards for label in shard}
            if not labels or None in labels or min(labels) < 0:
                what = "no images" if not labels else "images without a label" if None in labels else f"label {min(labels)}"
                raise DataError(f"{self.spec}, {split}: holds {what}")
        return made

    def _write(self, path: Path, counts: Counts) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"spec": self.spec, "files": self._stamps(), "counts": counts})
        write_text(path, text)

    def _paths(self) -> list[Path]:
        cached = cache_folder() / f"{hashlib.sha256(self.spec.encode()).hexdigest()[:32]}.json"
        return [*([self.folder / FILE] if self.folder else []), cached]

    def _stamps(self) -> list[list[Any]]:
        return [[file.name, file.stat().st_size] for file in self.files]


def _numbered(counts: dict[str, list[dict[str, int]]]) -> Counts:
    """Return counts whose labels JSON has made words, with numbers again."""
    return {split: [{int(label): n for label, n in shard.items()} for shard in shards] for split, shards in counts.items()}


def _counted(table: Any, label: str, workers: int) -> list[dict[int, int]]:
    """Return the counts of each shard, found by this process or by `workers` others."""
    count = partial(_count, table.select_columns([label]), label)
    if workers:
        # None of PyTorch's workers: in those, `datasets` reads a part of each shard.
        with ProcessPoolExecutor(workers, initializer=leave_signals_to_the_main_process, initargs=(0,)) as pool:
            return list(pool.map(count, range(table.num_shards)))
    return list(map(count, range(table.num_shards)))


def _count(table: Any, label: str, shard: int) -> dict[int, int]:
    return dict(Counter(row[label] for row in table.shard(table.num_shards, shard)))
