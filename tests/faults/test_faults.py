"""Every write, fsync and rename of a command may fail, and memory may end: a line, nothing torn, and the same command goes on.

After each fault, each file is what it was before or whole; no traceback; and the command, given again, ends as if nothing had
been. `shim.c` makes the faults. The quick tests take a few faults of each, the slow ones all.
"""

import ast
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import randomize
from forks import Ended, Fault, Forks
from PIL import Image
from safetensors.torch import load

import repvgg
from repvgg.data import open_source
from repvgg.models.convert import convert
from repvgg.train.loop import new_model

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and Linux")
MIB = 1 << 20
TRAIN = (
    "train --arch repvgg_micro --width 0.25 --data digits --limit 48 --epochs 2 --batch-size 16 --save-steps 1 --recipe demo "
    "--no-report --out"
)


@dataclass(frozen=True)
class Command:
    """What is run in a folder that holds `model.safetensors` and `deploy.safetensors`; below `out` it writes."""

    words: str
    packages: tuple[str, ...] = ()
    slow: bool = False


COMMANDS = {
    "convert": Command("convert model.safetensors out/deploy.safetensors"),
    "train": Command(f"{TRAIN} out"),
    "export": Command("export model.safetensors --to onnx --out out", ("onnx", "onnxscript", "onnxruntime"), slow=True),
    "predict": Command("predict deploy.safetensors --data digits --part-size 200 --out out", ("pyarrow",), slow=True),
    "bench": Command("bench repvgg_micro --input-size 32 --rounds 1 --batches 1 --warmup 0 --out out/speeds.json", slow=True),
    "paper": Command("paper table2 --out out", slow=True),
    "quantize": Command(
        "quantize model.safetensors --data digits --images 20 --limit 40 --to onnx --out out", ("nncf", "onnxruntime"), slow=True
    ),
}
# Slow ones write by the same `disk.atomically`: test_two_faults_of_each_command[convert] proves the point.
ALL = [pytest.param(name, marks=pytest.mark.slow if command.slow else []) for name, command in COMMANDS.items()]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    assert COMPILER is not None
    words = [COMPILER, "-O1", "-shared", "-fPIC", "-o", str(shim), str(Path(__file__).with_name("shim.c")), "-ldl"]
    subprocess.run(words, check=True)
    with Forks(shim) as faulty:
        yield faulty


def run(forks: Forks, name: str, desk: Path, at: int = 0, error: int = 0, on: bool = False, memory: int = 0) -> Ended:
    return forks(COMMANDS[name].words.split(), desk, Fault(str(desk / "out"), at, error, on), memory)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = new_model("repvgg_micro", open_source("digits"), log=str, width=0.25)
    repvgg.save(randomize(model, (16, 1, 16, 16)), folder / "model.safetensors")
    convert(folder / "model.safetensors", folder / "deploy.safetensors", log=lambda _: None)
    return folder


def desk(models: Path, place: Path) -> Path:
    shutil.copytree(models, place)
    (place / "out").mkdir()
    return place


# ------------------------------------------------------------------------------------------------------------- what is whole


def parquet(data: bytes) -> None:
    import pyarrow.parquet as pq

    pq.read_table(io.BytesIO(data))


def onnx(data: bytes) -> None:
    import onnx

    onnx.checker.check_model(onnx.load_from_string(data))


READERS: dict[str, Callable[[bytes], object]] = {
    ".safetensors": load,
    ".json": json.loads,
    ".jsonl": lambda data: [json.loads(line) for line in data.splitlines()],
    ".png": lambda data: Image.open(io.BytesIO(data)).load(),
    ".svg": lambda data: data.decode().index("</svg>"),
    ".parquet": parquet,
    ".onnx": onnx,
    ".py": ast.parse,
}


def files(out: Path) -> dict[str, bytes]:
    """Return what a user sees in the folder, TensorBoard's log aside, which grows by lines."""
    seen = (p for p in out.rglob("*") if p.is_file() and not p.name.startswith((".", "events.")))
    return {str(p.relative_to(out)): p.read_bytes() for p in seen}


def assert_whole(out: Path, before: dict[str, bytes]) -> None:
    """Each file is as it was, or one that can be read to its end; and nothing half-made lies about."""
    for name, data in files(out).items():
        if data != before.get(name):
            READERS[Path(name).suffix](data)
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]


def results(out: Path) -> dict[str, Any]:
    """Return the tensors and tables among the files, which do not depend on when they were made."""
    found: dict[str, Any] = {}
    for name, data in files(out).items():
        if name.endswith(".safetensors"):
            found[name] = {key: (tensor.dtype, tensor.tolist()) for key, tensor in load(data).items()}
        elif name.endswith((".parquet", ".onnx")):
            found[name] = data
    return found


# ---------------------------------------------------------------------------------------------------------------- I/O faults


def needs(name: str) -> None:
    for package in COMMANDS[name].packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def survive(forks: Forks, name: str, models: Path, tmp_path: Path, most: int | None) -> None:
    """Run the command with each fault, and then again; with `most`, only so many faults, spread over the run."""
    needs(name)
    whole = desk(models, tmp_path / "whole")
    undisturbed = run(forks, name, whole)
    assert (undisturbed.code, undisturbed.calls > 0) == (0, True), undisturbed.err
    wanted, count = results(whole / "out"), undisturbed.calls
    places = range(1, count + 1)
    chosen = places if most is None else sorted({places[round(i * (count - 1) / (most - 1))] for i in range(most)})
    kinds = ((errno.ENOSPC, True), (errno.EIO, False))  # a disk that is full stays full; a bad block is one
    for turn, at in enumerate(chosen):
        for error, on in kinds if most is None else [kinds[turn % 2]]:
            place = desk(models, tmp_path / f"{at}-{error}")
            before = files(place / "out")
            failed = run(forks, name, place, at, error, on)
            told = f"{name}: {os.strerror(error)} at {at} of {count}: exit {failed.code}\n{failed.err}"
            assert failed.in_a_line(), told
            assert_whole(place / "out", before)
            again = run(forks, name, place)
            assert again.code == 0, f"{told}\nand then\n{again.err}"
            assert results(place / "out") == wanted, told
            shutil.rmtree(place)


@pytest.mark.parametrize("name", ALL)
def test_two_faults_of_each_command(name: str, faulty: Forks, models: Path, tmp_path: Path) -> None:
    survive(faulty, name, models, tmp_path, most=2)


@pytest.mark.slow  # test_two_faults_of_each_command proves the point
@pytest.mark.parametrize("name", COMMANDS)
def test_every_fault_of_each_command(name: str, faulty: Forks, models: Path, tmp_path: Path) -> None:
    survive(faulty, name, models, tmp_path, most=None)


def test_what_was_there_stays_until_the_new_is_whole(faulty: Forks, models: Path, tmp_path: Path) -> None:
    """A target that exists already: after every fault of convert, the old file or the new one."""
    whole = desk(models, tmp_path / "whole")
    count = run(faulty, "convert", whole).calls
    new = (whole / "out/deploy.safetensors").read_bytes()
    kept: set[bool] = set()
    for at in range(1, count + 1):
        place = desk(models, tmp_path / str(at))
        old = (models / "model.safetensors").read_bytes()
        (place / "out/deploy.safetensors").write_bytes(old)
        run(faulty, "convert", place, at, errno.EIO)
        found = (place / "out/deploy.safetensors").read_bytes()
        assert found in (old, new)
        kept.add(found == old)
    assert True in kept  # the faults did strike


# ------------------------------------------------------------------------------------------------------------- out of memory


def starve(forks: Forks, name: str, models: Path, tmp_path: Path, limits: tuple[int, ...]) -> None:
    needs(name)
    codes = []
    for limit in limits:
        place = desk(models, tmp_path / str(limit))
        ended = run(forks, name, place, memory=limit * MIB)
        assert ended.in_a_line(), f"{name} with {limit} MiB: exit {ended.code}\n{ended.err}"
        assert_whole(place / "out", {})
        codes.append(ended.code)
    assert 2 in codes, f"{name}: no limit was low enough to strike"


@pytest.mark.parametrize("name", ["convert", "train", pytest.param("predict", marks=pytest.mark.slow)])  # ends as convert does
def test_little_memory_is_one_line_or_success(name: str, faulty: Forks, models: Path, tmp_path: Path) -> None:
    starve(faulty, name, models, tmp_path, (1, 64, 1024))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_growing_memory_is_one_line_or_success(name: str, faulty: Forks, models: Path, tmp_path: Path) -> None:
    starve(faulty, name, models, tmp_path, tuple(2**i for i in range(12)))
