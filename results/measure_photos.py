"""Train on 900 photos from nothing as `--recipe auto` chooses, in ten minutes, and record how good that is; results/photos.json.

    python results/measure_photos.py ../shared/data/cifar10 [--minutes 10] [--arch repvgg_a0] [--seed 0]

No photos can be had where this was written, so it makes a stand-in: images of six classes of CIFAR-10, 32 pixels wide, enlarged to
160 and written as JPEG: 150 of each class to train on, 50 to validate on, and, of CIFAR-10's own test images, 500 that only the
last figure sees. They are blurred, which makes them harder than photos; of two classes that are often confused, one is taken.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from repvgg import evaluate
from repvgg.data import Images, open_source
from repvgg.measure.machine import write_record

OUT = Path(__file__).with_name("photos.json")
CLASSES = ("airplane", "automobile", "dog", "frog", "horse", "ship")
SIDE = 160  # pixels
EACH = {"train": 150, "val": 50, "test": 500}  # photos a class


def make_photos(data: str, folder: Path) -> None:
    """Write the stand-in: folder/train/<class>/*.jpg, and val/ and test/ alike."""
    source = open_source(data)
    numbers = [source.classes.index(name) for name in CLASSES]
    images = _of_classes(source.train, numbers, EACH["train"] + EACH["val"])
    held_out = _of_classes(source.val, numbers, EACH["test"])
    for name, own, others in zip(CLASSES, images, held_out, strict=True):
        for split, photos in (("train", own[: EACH["train"]]), ("val", own[EACH["train"] :]), ("test", others)):
            target = folder / split / name
            target.mkdir(parents=True)
            for number, pixels in enumerate(photos):
                photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(target / f"{number:03}.jpg", quality=92)


def _of_classes(images: Images, classes: list[int], count: int) -> list[list[Any]]:
    """Return the first images of each class."""
    found: dict[int, list[Any]] = {number: [] for number in classes}
    for i in range(len(images)):
        pixels, label = images[i]
        if len(found.get(label, range(count))) < count:
            found[label].append(pixels)
        if all(len(some) == count for some in found.values()):
            break
    return list(found.values())


def train(photos: Path, run: Path, arch: str, minutes: float, seed: int) -> dict[str, Any]:
    """Train as a user would, and return the minutes that it took, by the clock and of all cores together, and what was said."""
    words = ["--arch", arch, "--init", "none", "--data", photos, "--minutes", minutes, "--seed", seed, "--out", run, "--no-report"]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "repvgg", "train", *map(str, words)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "minutes": (time.perf_counter() - started) / 60,
        "cpu_minutes": spent / 60,
        "chosen": [line for line in said.stderr.splitlines() if line.startswith("auto: ")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of CIFAR-10's parquet shards")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--arch", default="repvgg_a0")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, run = Path(folder) / "photos", Path(folder) / "run"
        make_photos(f"hf:{asked.data}", photos)
        facts = train(photos, run, asked.arch, asked.minutes, asked.seed)
        summary, recipe = (json.loads((run / name).read_text()) for name in ("summary.json", "recipe.json"))
        top1 = {name: evaluate(run / f"{name}.safetensors", photos, split="test").score for name in ("best", "last")}
    figures = {
        "what": f"CIFAR-10's {', '.join(CLASSES)}, enlarged from 32 to {SIDE} pixels, in place of photos; from new weights",
        "photos": {split: count * len(CLASSES) for split, count in EACH.items()},
        "asked": {"arch": asked.arch, "minutes": asked.minutes, "seed": asked.seed},
        **facts,
        "recipe": recipe,
        "best_epoch": summary["best_epoch"],
        "val_top1": summary["best_top1"],
        "test_top1": top1,
    }
    write_record(OUT, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
