"""cluster.py: whatever is killed, on however many nodes, every image has one row in the end, and memory stays bounded."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from predicting import command, rows, run

from repvgg.data import open_source
from repvgg.predict.job import Job

ENV = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}  # nobody's token is read, and no worker starved
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@contextmanager
def cluster(*processors: int, store: int = 200) -> Iterator[str]:
    """Start a cluster with a node for each number of processors, and yield its address. store: MB of objects a node."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    with ExitStack() as stack:
        for node, count in enumerate(processors):
            first = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"]
            words = f"--block --disable-usage-stats --num-cpus={count} --object-store-memory={store * 10**6}".split()
            place = ["--node-ip-address=127.0.0.1", *(first if node == 0 else [f"--address={address}"])]
            process = subprocess.Popen(
                [*RAY, "start", *place, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV
            )
            stack.callback(ended, process)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            assert any("--block" in line for line in iter(process.stdout.readline, "")), "the node has not started"
        yield address


def ended(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def on(address: str, job: Job, *more: str) -> list[str]:
    return [*command(job), "--ray", address, *more]


def finished(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=ENV)
    assert done.returncode == 0, done.stderr


def actors() -> list[psutil.Process]:
    """Return the actors that predict, of clusters that this process started."""
    return [p for p in psutil.Process().children(recursive=True) if "Predictor" in "".join(p.cmdline()[:1])]


def begun(words: list[str], out: str) -> "subprocess.Popen[bytes]":
    """Return the command's process once there is a part."""
    said = Path(out).with_suffix(".said")
    with said.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=ENV)
    while process.poll() is None and not list(Path(out).glob("*.parquet")):
        time.sleep(0.02)
    assert process.poll() is None, said.read_text()
    return process


def equal(out: str, wanted: str) -> None:
    """Assert that two folders hold the same rows, each once."""
    found, expected = ({row["key"]: row for row in rows(folder)} for folder in (out, wanted))
    assert len(rows(out)) == len(found)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        got = found[key]
        assert (got["label"], got["error"]) == (row["label"], row["error"])
        assert got["probabilities"] == pytest.approx(row["probabilities"], abs=1e-4)
        assert got["labels"][0] == row["labels"][0] or row["probabilities"][0] - row["probabilities"][1] < 1e-4


def write(folder: Path, files: int, each: int, images: Any) -> str:
    """Write Parquet files of encoded images, and return the name of the data."""
    folder.mkdir()
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for number in range(files):
        some = [images(number * each + i) for i in range(each)]
        columns = {"image": [{"bytes": image, "path": None} for image, _ in some], "label": [label for _, label in some]}
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"test-{number:05d}-of-{files:05d}.parquet")
    return f"hf-stream:{folder}"


@pytest.mark.parametrize("concurrency", ["1,1", "2,2"])
def test_a_driver_that_is_killed_goes_on(job: Job, tmp_path: Path, concurrency: str) -> None:
    """With as many actors as processors, too: what reads does not starve."""
    job = replace(job, part_size=30, batch_size=10)
    run(replace(job, out=str(tmp_path / "alone")))
    with cluster(2) as address:
        words = on(address, job, "--concurrency", concurrency)
        driver = begun(words, job.out)
        driver.kill()
        driver.wait()
        there = {path.name for path in Path(job.out).glob("part-*.parquet")}
        finished(words)
        assert there <= {path.name for path in Path(job.out).glob("part-*.parquet")}  # not made again
    equal(job.out, str(tmp_path / "alone"))


def test_a_cluster_that_is_killed_goes_on(job: Job, tmp_path: Path) -> None:
    job = replace(job, part_size=30, batch_size=10)
    run(replace(job, out=str(tmp_path / "alone")))
    with cluster(2) as address:
        driver = begun(on(address, job), job.out)
    driver.kill()
    driver.wait()
    finished(on("auto", job))  # although Ray remembers the address of the one that is gone
    equal(job.out, str(tmp_path / "alone"))


def test_two_nodes_of_which_one_loses_an_actor(files: Path, tmp_path: Path) -> None:
    """20,000 images in 40 files."""
    from torchvision.io import encode_png

    digits = open_source("digits").val
    scans = [(bytes(encode_png(digits[i][0]).numpy().tobytes()), digits[i][1]) for i in range(len(digits))]
    data = write(tmp_path / "set", 40, 500, lambda i: scans[i * 7 % len(scans)])
    job = Job(str(files / "grey.safetensors"), data, str(tmp_path / "alone"))
    run(job)
    assert len(rows(job.out)) == 20_000
    job = replace(job, out=str(tmp_path / "ray"))
    with cluster(1, 1) as address:
        process = begun(on(address, job), job.out)
        victims = actors()
        assert len(victims) >= 1
        victims[-1].kill()
        assert process.wait(900) == 0
    equal(job.out, str(tmp_path / "alone"))


def test_memory_is_bounded(files: Path, tmp_path: Path) -> None:
    """200,000 rows with 1 GB of objects that are no images, so that they pass quickly: less than 3 GB in all processes together.

    Most of it is PyTorch's, in the driver, in a task that reads and in an actor; each further actor takes 0.6 GB more.
    """
    random = np.random.default_rng(0)
    data = write(tmp_path / "set", 40, 5000, lambda i: (random.bytes(5000), 0))
    job = Job(str(files / "grey.safetensors"), data, str(tmp_path / "out"), part_size=4096)
    most = [0.0]
    with cluster(2, store=600) as address:
        words = on(address, job, "--concurrency", "1,1")
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
        while process.poll() is None:
            most[0] = max(most[0], memory(psutil.Process().children(recursive=True)))
            time.sleep(0.5)
        assert process.returncode == 0
    print(f"{most[0] / 1e9:.2f} GB")
    assert sum(pq.read_metadata(path).num_rows for path in Path(job.out).glob("*.parquet")) == 200_000
    assert most[0] < 3e9


def memory(processes: list[psutil.Process]) -> float:
    """Return the bytes of these processes, what they share counted once."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total
