"""cluster.py: Ray Data makes the rows that the plain loop makes, whatever is killed on the way."""

import json
import os
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from predicting import command, rows, run
from roads import make_camvid
from rounding import REPORTED

from repvgg.disk import FileError
from repvgg.predict import cluster, connect, reading
from repvgg.predict.actors import Cluster
from repvgg.predict.job import Job
from repvgg.predict.remote import open_data
from repvgg.predict.store import Store

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
ALONE = Cluster("auto", "1,1")


def by_key(out: str | Path) -> dict[str, dict[str, Any]]:
    found = rows(out)
    assert len({row["key"] for row in found}) == len(found)  # none twice
    return {row["key"]: row for row in found}


def on_ray(job: Job, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command as a user does, in a process with a cluster of its own."""
    words = [*command(job), "--ray", "auto", "--concurrency", "1,1", "--json", *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=900, env={**os.environ, **environment})


# ---------------------------------------------------------------------------------------------------- what needs no cluster


def test_the_pipeline_without_ray_gives_the_rows_of_the_loop(files: Path, photos: Path, tmp_path: Path) -> None:
    """Read, decode and predict, as Ray calls them: names that are no UTF-8 and images that are none included."""
    (photos / "val/cat/00.png").rename(photos / "val/cat" / os.fsdecode(b"\xe9.png"))
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "out"), part_size=4, batch_size=3)
    run(job)
    shards = open_data(job.data, "val", 4)
    (tmp_path / "ray").mkdir()
    store = Store.of(str(tmp_path / "ray"))
    _, decoder, schema = cluster._agreed(job, shards, store, str)
    actor = cluster.Predictor(job, "", store)
    tables = [actor(cluster._decode(decoder, table)) for table in reading._blocks(job, [0, 1, 2], store.done())]
    found = {row["key"]: row for table in tables for row in table.to_pylist()}
    for key, wanted in by_key(job.out).items():
        got = found.pop(key)
        assert got.pop("probabilities") == pytest.approx(wanted.pop("probabilities"), abs=REPORTED)
        assert got == wanted
    assert not found
    cluster._write(store, tables[0].cast(schema))
    assert store.counts() == (1, tables[0].num_rows, sum(row["error"] is not None for row in tables[0].to_pylist()))
    left = [key for table in reading._blocks(job, [0, 1, 2], store.done()) for key in table["key"].to_pylist()]
    assert sorted(left + tables[0]["key"].to_pylist()) == sorted(by_key(job.out))


def test_what_is_refused_before_ray_is_asked(files: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "out"))
    run(job)
    with pytest.raises(FileError, match="was begun with the runner None, not ray: give another --out"):
        cluster.predict_on_ray(job, ALONE, str)
    monkeypatch.setattr(connect, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--ray needs ray, pandas: pip install 'ray\[data\]' pyarrow"):
        cluster.predict_on_ray(job, ALONE, str)


# ------------------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.slow
def test_ray_gives_the_rows_of_the_loop(files: Path, photos: Path, tmp_path: Path) -> None:
    job = Job(str(files / "colour.safetensors"), str(photos), str(tmp_path / "out"), part_size=4)
    run(job)
    alone, job = job.out, replace(job, out=str(tmp_path / "ray"))
    done = on_ray(job)
    assert done.returncode == 0, done.stderr
    assert {k: v for k, v in json.loads(done.stdout).items() if k in ("images", "errors", "here")} == {
        "images": 11,
        "errors": 1,
        "here": 11,
    }
    for key, row in by_key(job.out).items():
        wanted = by_key(alone)[key]
        assert (row["label"], row["labels"], row["error"]) == (wanted["label"], wanted["labels"], wanted["error"])
    assert json.loads(on_ray(job).stdout)["here"] == 0
    refused = on_ray(replace(job, part_size=5))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "was begun with the part size 4, not 5" in refused.stderr


@pytest.mark.slow
def test_from_and_to_an_object_store(bucket: str, files: Path, photos: Path, tmp_path: Path) -> None:
    for path in sorted((photos / "val").rglob("*.png")):
        Store.of(f"{bucket}/in").write(str(path.relative_to(photos / "val")), path.read_bytes())
    job = Job(str(files / "colour.safetensors"), f"{bucket}/in", f"{bucket}/out", part_size=4)
    done = on_ray(job)
    assert done.returncode == 0, done.stderr
    run(replace(job, out=str(tmp_path / "local")))
    store = Store.of(job.out)
    found = {row["key"]: row for part in store.parts() for row in pq.read_table(part, filesystem=store.files).to_pylist()}
    wanted = by_key(tmp_path / "local")
    assert found.keys() == wanted.keys()
    assert all(found[key]["labels"] == wanted[key]["labels"] for key in wanted)


@pytest.mark.slow
def test_masks(files: Path, tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "camvid", val=3)
    job = Job(str(files / "masks.safetensors"), str(root / "val"), str(tmp_path / "out"))
    run(job)
    done = on_ray(replace(job, out=str(tmp_path / "ray")))
    assert done.returncode == 0, done.stderr
    for key, row in by_key(tmp_path / "ray").items():
        mask = by_key(job.out)[key]["mask"]
        assert (tmp_path / "ray" / row["mask"]).read_bytes() == (Path(job.out) / mask).read_bytes()
