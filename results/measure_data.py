"""Measure how fast images are loaded, and a whole data set is predicted with and without Ray: writes results/data.json.

python results/measure_data.py hf:../shared/data/cifar10             # --tiny OUT: a try, on a few images

Under four minutes on two quiet cores. Photos are made here: smooth noise, 500 x 375, as many bytes as ImageNet's.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter

from repvgg import save
from repvgg.bench.data import data_speeds
from repvgg.data import images, open_source
from repvgg.measure.machine import write_record
from repvgg.train.loop import new_model
from repvgg.train.recipes import get_recipe

WORKERS, ROUNDS = 2, 3
SIZE, QUALITY = (500, 375), 92


def photos(count: int) -> list[bytes]:
    """Return encoded photos: smooth shapes under a little noise."""
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        noise = Image.fromarray(random.integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
        file = io.BytesIO()
        Image.blend(small, noise, 0.35).save(file, "JPEG", quality=QUALITY)
        found.append(file.getvalue())
    return found


def lay_out(root: Path, encoded: list[bytes]) -> tuple[str, str]:
    """Write photos as a class folder and as shards; return the names of both."""
    for split, some in (("train", encoded), ("val", encoded[:8])):
        for i, data in enumerate(some):
            path = root / "folder" / split / "ab"[i % 2] / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (root / "shards").mkdir(exist_ok=True)
        for shard in range(8):
            with tarfile.open(root / "shards" / f"{split}-{shard:03d}.tar", "w") as tar:
                for i in range(shard, len(some), 8):
                    for suffix, content in (("jpg", some[i]), ("cls", str(i % 2).encode())):
                        info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return str(root / "folder"), f"wds:{root / 'shards'}"


@contextmanager
def pillow_alone() -> Iterator[None]:
    """Decode as it was before JPEGs were read by torchvision."""
    usual = images._from_jpeg
    images._from_jpeg = lambda *_: None
    try:
        yield
    finally:
        images._from_jpeg = usual


def stages(spec: str, recipe: str, count: int, rounds: int) -> dict[str, float]:
    """Return the medians of images a second by stage."""
    found = [data_speeds(open_source(spec), get_recipe(recipe), WORKERS, count=count) for _ in range(rounds)]
    return {stage: float(np.median([speeds[stage] for speeds in found])) for stage in found[0]}


def predict(model: str, data: str, out: Path, part: int, *more: str) -> dict[str, Any]:
    """Predict a whole data set by the command.

    whole: images a second from the command's first image to its last; steady: from its first part on, when all have started.
    """
    words = [sys.executable, "-m", "repvgg", "predict", model, "--data", data, "--out", str(out), "--part-size", str(part)]
    done = subprocess.run([*words, "--device", "cpu", "--json", *more], check=True, capture_output=True, text=True)
    summary = json.loads(done.stdout)
    parts = sorted(out.glob("part-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    seconds = (parts[-1].stat().st_mtime_ns - parts[0].stat().st_mtime_ns) / 1e9
    rows = sum(pq.read_metadata(path).num_rows for path in parts[1:])
    return {"images": summary["images"], "whole": summary["images"] / summary["seconds"], "steady": rows / seconds}


def labels(out: Path) -> dict[str, str]:
    return {row["key"]: row["labels"][0] for row in pq.read_table(out, columns=["key", "labels"]).to_pylist()}


def main(cifar10: str, tiny: str = "") -> None:
    count, rounds, part = (24, 1, 64) if tiny else (256, ROUNDS, 512)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoded = photos(count)
        spec, shards = lay_out(root, encoded)
        loading = {"photos, folder": stages(spec, "light", count, rounds), "photos, shards": stages(shards, "light", count, rounds)}
        with pillow_alone():
            loading["photos, folder, Pillow alone"] = stages(spec, "light", count, rounds)
        loading["CIFAR-10, on the device"] = stages(cifar10, "cifar", 100 * count, rounds)
        torch.manual_seed(0)
        network = new_model("repvgg_a0", open_source(cifar10), log=str, width=0.5)
        model = str(root / "model.safetensors")
        save(network.eval(), model)
        alone = predict(model, cifar10, root / "alone", part)
        ray = predict(model, cifar10, root / "ray", part, "--ray", "auto")
        found, wanted = labels(root / "ray"), labels(root / "alone")
        assert found.keys() == wanted.keys()
        write_record(
            Path(tiny or __file__).with_name("data.json"),
            {
                "what": "images a second: by stage of loading, one process a stage; and of whole predictions, alone and on Ray",
                "loading": loading,
                "protocol": {"photos": count, "bytes": sum(map(len, encoded)) // count, "workers": WORKERS, "rounds": rounds},
                "prediction": {
                    "model": "repvgg_a0 at width 0.5",
                    "alone": alone,
                    "ray": ray,
                    "ratio": ray["steady"] / alone["steady"],
                    "same_labels": sum(found[key] == label for key, label in wanted.items()),
                },
            },
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3] if "--tiny" in sys.argv else "")
