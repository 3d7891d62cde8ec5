"""Measure how fast images are loaded, and a whole data set is predicted with and without Ray: writes results/data.json.

python results/measure_data.py hf:../shared/data/cifar10 [PART ...]          # --tiny OUT: a try, on a few images

Under ten minutes on two quiet cores. Each part is written as soon as it is measured; those not named stay as they were. Photos are
made here: smooth noise, 500 x 375, as many bytes as ImageNet's; and 4000 x 3000, as a phone takes them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import photos
import psutil
import pyarrow.parquet as pq
import torch
from records import keep, say
from torch.utils.data import default_collate

import repvgg.bench.data
from repvgg import create_model, save
from repvgg.bench.data import data_speeds
from repvgg.data import Source, images, open_source, transforms
from repvgg.data.resident import Resident
from repvgg.train import batches
from repvgg.train.evaluate import batches as validation
from repvgg.train.loop import new_model
from repvgg.train.recipes import get_recipe
from repvgg.train.state import State, Store
from repvgg.train.trainer import Trainer

WORKERS, ROUNDS = 2, 3
Record = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------------ loading


@contextmanager
def earlier() -> Iterator[None]:
    """Load as it was done first: by Pillow, every pixel, one colour after the other, image by image."""
    upright = images._upright
    with ExitStack() as stack:
        for where, name, what in (
            (images, "_from_jpeg", lambda *_: None),
            (images, "_upright", lambda *turned: upright(*turned).contiguous()),
            (batches, "side_of", lambda *_: 0),
            (transforms, "collated", default_collate),
            (repvgg.bench.data, "collated", default_collate),
            (Resident, "of", lambda *_: None),
        ):
            stack.enter_context(patch.object(where, name, what))
        yield


@cache
def _opened(spec: str) -> Source:
    """Keep data open, which small images stay decoded in."""
    return open_source(spec)


def stages(spec: str, recipe: str, count: int, rounds: int, workers: int = WORKERS) -> dict[str, float]:
    """Return the medians of images a second by stage."""
    how = replace(get_recipe(recipe), batch_size=min(32, count // 4) if recipe == "light" else 128)
    source = _opened(spec)
    found = [data_speeds(source, how, workers, count=count) for _ in range(rounds)]
    return {stage: float(np.median([speeds[stage] for speeds in found])) for stage in found[0]}


def loading(spec: str, recipe: str, count: int, rounds: int, workers: int = WORKERS) -> dict[str, dict[str, float]]:
    """Return the medians now and as it was done first, whose rounds take turns."""
    found: dict[str, list[dict[str, float]]] = {"now": [], "earlier": []}
    for _ in range(rounds):
        found["now"].append(stages(spec, recipe, count, 1, workers))
        with earlier():
            found["earlier"].append(stages(spec, recipe, min(count, 4096), 1, workers))
    return {when: {s: float(np.median([speeds[s] for speeds in some])) for s in some[0]} for when, some in found.items()}


def of_photos(folder: Path, tiny: bool) -> Record:
    spec, shards, each = photos.lay_out(folder, 16 if tiny else 512)
    count, rounds = (16, 1) if tiny else (512, ROUNDS)
    found = {"folder": loading(spec, "light", count, rounds), "shards": loading(shards, "light", count, rounds)}
    large, _, more = photos.lay_out(folder / "large", 8 if tiny else 16, photos.PHONE)
    found["folder of 12 megapixels"] = loading(large, "light", 8 if tiny else 16, 1)
    return {"workers": WORKERS, "rounds": rounds, "photos": count, "bytes": each, "bytes of 12 megapixels": more, "stages": found}


def of_cifar10(spec: str, tiny: bool) -> Record:
    source = _opened(spec)
    count = 512 if tiny else 25_600
    started = time.perf_counter()
    Resident.of(source.train, source.preprocessing, "cpu")
    seconds = time.perf_counter() - started
    Resident.of(source.val, source.preprocessing, "cpu")
    found = loading(spec, "cifar", count, 1 if tiny else ROUNDS, workers=0)
    started = time.perf_counter()
    seen = sum(len(x) for x, _ in validation(source.val, source.preprocessing, 256))
    found["now"]["validation"] = seen / (time.perf_counter() - started)
    return {"seconds to decode once": seconds, "images": len(source.train), "stages": {"CIFAR-10": found}}


def of_state(folder: Path, tiny: bool) -> Record:
    """Time how long training waits for a state of A0, and how long its writing takes beside it."""
    recipe, store = replace(get_recipe("light"), channels_last=False), Store(folder)
    trainer = Trainer(create_model("repvgg_a0", width=0.125 if tiny else 1.0), recipe, 1000)
    trainer.train()
    trainer.step([(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))], 1e-3, 0)
    waits, whole = [], []
    for step in range(1, 6):
        started = time.perf_counter()
        store.save_soon(State(step, trainer.tensors(), {}))
        waits.append(time.perf_counter() - started)
        store.wait()
        whole.append(time.perf_counter() - started)
    return {"model": "repvgg_a0", "seconds waited": float(np.median(waits)), "seconds written": float(np.median(whole))}


# --------------------------------------------------------------------------------------------------------------- prediction


def predict(model: str, data: str, out: Path, part: int, *more: str) -> Record:
    """Predict a whole data set by the command.

    whole: images a second from the command's first image to its last; steady: from its first part on, when all have started.
    gigabytes: the most memory that its processes have held together, what they share counted once.
    """
    words = [sys.executable, "-m", "repvgg", "predict", model, "--data", data, "--out", str(out), "--part-size", str(part)]
    with subprocess.Popen([*words, "--device", "cpu", "--json", *more], stdout=subprocess.PIPE, text=True) as process:
        most = 0.0
        while process.poll() is None:
            most = max(most, photos.memory(psutil.Process(process.pid)))
            time.sleep(1)
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
    parts = sorted(out.glob("part-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    seconds = (parts[-1].stat().st_mtime_ns - parts[0].stat().st_mtime_ns) / 1e9
    rows = sum(pq.read_metadata(path).num_rows for path in parts[1:])
    speeds = {"whole": summary["images"] / summary["seconds"], "steady": rows / max(seconds, 1e-9)}
    return {"images": summary["images"], **speeds, "gigabytes": most / 1e9}


def labels(out: Path) -> dict[str, str]:
    return {row["key"]: row["labels"][0] for row in pq.read_table(out, columns=["key", "labels"]).to_pylist()}


def of_prediction(spec: str, folder: Path, tiny: bool) -> Record:
    torch.manual_seed(0)
    model = str(folder / "model.safetensors")
    save(new_model("repvgg_a0", _opened(spec), log=str, width=0.0625 if tiny else 0.5).eval(), model)
    alone = predict(model, spec, folder / "alone", 512)
    ray = predict(model, spec, folder / "ray", 512, "--ray", "auto")
    found, wanted = labels(folder / "ray"), labels(folder / "alone")
    assert found.keys() == wanted.keys()
    same = sum(found[key] == label for key, label in wanted.items())
    return {
        "model": "repvgg_a0 at width 0.5",
        "alone": alone,
        "ray": ray,
        "ratio": ray["steady"] / alone["steady"],
        "same_labels": same,
    }


def of_memory(folder: Path, tiny: bool) -> Record:
    """Predict 200,000 rows of 5,000 random bytes, 1 GB, which are no images and so pass quickly."""
    files = 2 if tiny else 40
    random = np.random.default_rng(0)
    data = photos.write_rows(folder / "rows", files, 5000, lambda: random.bytes(5000))
    model = str(folder / "small.safetensors")
    save(create_model("repvgg_micro", num_classes=10, width=0.25).eval(), model)
    return predict(model, data, folder / "of rows", 4096, "--ray", "auto", "--concurrency", "1,1")


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("cifar10")
    words.add_argument("parts", nargs="*")
    words.add_argument("--tiny", default="")
    given = words.parse_args()
    spec, tiny, out = given.cifar10, bool(given.tiny), Path(given.tiny or __file__).with_name("data.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], Record]] = {
            "photos": lambda: of_photos(folder, tiny),
            "cifar10": lambda: of_cifar10(spec, tiny),
            "state": lambda: of_state(folder, tiny),
            "prediction": lambda: of_prediction(spec, folder, tiny),
            "memory": lambda: of_memory(folder, tiny),
        }
        for part in given.parts or parts:
            started = time.perf_counter()
            keep(out, part, parts[part]())
            say(f"{part}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
