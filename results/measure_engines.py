"""Every engine on A0 at 224: speed, error, memory, time to the first logits, and what "auto" takes; and whether exported files
predict what PyTorch does on real images. Writes results/engines.json.

python results/measure_engines.py speed load                      # on a machine that does nothing else; "speed bf16": only that
python results/measure_engines.py predictions runs/cifar10/best.safetensors hf:../shared/data/cifar10

A part that is not named keeps its figures. Speeds come of one run for each batch size and precision, in which the engines take
turns. Load and memory come of a process for each engine, begun twice: with empty caches, and with those that the first left.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from records import keep, say

from repvgg import load, load_engine, save
from repvgg.bench.memory import held, peak
from repvgg.bench.models import Candidate, bench, candidates, network
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.export import export, real_images
from repvgg.deploy.fastest import fastest
from repvgg.deploy.formats import FORMATS
from repvgg.deploy.parity import CLEAR, compare, reference
from repvgg.models.zoo import manifest_of

OUT = Path(__file__).with_name("engines.json")
MODEL, SIZE = "repvgg_a0", (3, 224, 224)
BATCHES, PRECISIONS = (1, 32), ("fp32", "bf16")
THREADS, ROUNDS, WARMUP = 2, 9, 2
PROTOCOL = {"model": MODEL, "input_size": SIZE, "threads": THREADS, "rounds": ROUNDS, "warmup": WARMUP}
IMAGES = 1000
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "REPVGG_ENGINE_CACHE")


def speed(precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a table for each batch size and precision; ratios are to PyTorch. "auto" chooses before the run that judges it."""
    for batch_size in BATCHES:
        for precision in precisions:
            taken = _auto(batch_size) if precision == "fp32" else ""
            report = bench(
                candidates([MODEL], ["all"], [precision], log=say),
                batch_size=batch_size,
                rounds=ROUNDS,
                batches=10 if batch_size == 1 else 1,
                warmup=WARMUP,
                threads=THREADS,
                log=say,
            )
            rows: dict[str, dict[str, Any]] = {
                row.candidate.engine: {
                    "images_per_second": row.images_per_second,
                    "quartiles": row.spread,
                    "over_eager": asdict(row.ratio),
                    "max_rel_err": row.error,
                }
                for row in report.rows
            }
            table: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "engines": rows}
            if precision == "fp32":
                speeds = {name: row["images_per_second"] for name, row in rows.items()}
                table["auto"] = {"taken": taken, "share_of_best": speeds[taken] / max(speeds.values())}
            say(json.dumps(table, indent=1))
            yield table


def _auto(batch_size: int) -> str:
    deploy, _ = network(Candidate(MODEL))
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):  # so that nothing is remembered
        return fastest(deploy, Options(SIZE, batch_size, threads=THREADS), say)


def load_and_memory() -> dict[str, Any]:
    """Return by engine, in fp32, the seconds from opening a file to the logits of one image, and by how much the process grew."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save(network(Candidate(MODEL))[0], file)
        for name in engines.installed("fp32", log=say):
            environment = {**os.environ, **dict.fromkeys(CACHES, str(Path(folder) / name))}
            command = [sys.executable, __file__, "one", name, str(file)]
            first, again = (
                json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
                for _ in range(2)
            )
            found[name] = {"seconds": again["seconds"], "seconds_with_empty_caches": first["seconds"], "bytes": again["bytes"]}
            say(f"{name}: {found[name]}")
    return found


def one(name: str, file: str) -> None:
    """Print the seconds and bytes of one engine: the work of a process of its own."""
    torch.set_num_threads(THREADS)
    before, started = held("cpu"), time.perf_counter()
    load_engine(file, name, threads=THREADS)(torch.zeros(1, *SIZE))
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": peak("cpu") - before}))


def predictions(file: str, data: str) -> dict[str, Any]:
    """Compare an exported file of each format with PyTorch in float64, on real images."""
    model, found = load(file), {}
    images = real_images(model, data, IMAGES)
    wanted = reference(model, images)
    options = Options(manifest_of(model).preprocessing.input_size, 50)
    with tempfile.TemporaryDirectory() as folder:
        for to, known in FORMATS.items():
            path = export(model, to, folder, log=say)
            runtime = engines.runtime(known.module)
            found[to] = asdict(compare(runtime.open_file(path, options).in_turns(images, 50), wanted))
            say(f"{to}: {found[to]}")
    return {"model": manifest_of(model).arch, "data": Path(data).name, "clear": CLEAR, "formats": found}


def main(words: list[str]) -> None:
    torch.set_num_threads(THREADS)
    if "predictions" in words:
        keep(OUT, "predictions", predictions(*words[1:]), {"protocol": PROTOCOL})
    if "speed" in words:
        for table in speed([p for p in PRECISIONS if p in words] or PRECISIONS):
            keep(OUT, f"speed/batch {table['batch_size']}, {table['precision']}", table, {"protocol": PROTOCOL})
    if "load" in words:
        keep(OUT, "load", load_and_memory(), {"protocol": PROTOCOL})


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1] == "one" else main(sys.argv[1:])
