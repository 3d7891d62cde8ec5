"""What the tests of predictions do again and again."""

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from repvgg.predict.datasets import predict_data
from repvgg.predict.job import Job, Summary


def run(job: Job) -> Summary:
    return predict_data(job, log=str)


def rows(out: str | Path) -> list[dict[str, Any]]:
    return list(pq.read_table(out).to_pylist())


def parts(out: str | Path) -> dict[str, tuple[int, int]]:
    """Each with what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(Path(out).glob("part-*"))}


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "repvgg", *words(job)]


def words(job: Job) -> list[str]:
    """What comes after `repvgg`."""
    given = ("predict", job.model, "--data", job.data, "--out", job.out, "--part-size", job.part_size)
    return [*map(str, given), "--batch-size", str(job.batch_size), "--device", "cpu"]
