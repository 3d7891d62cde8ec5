"""Train on few images from the embedded CIFAR-10 model and from new weights, as where no hub can be reached; write init.json.

    python results/measure_init.py ../shared/data/camvid [--epochs 8] [--seeds 1]

CIFAR-10's own images would flatter it, so the photos are patches of CamVid's streets: 64 pixels wide and shrunk to the 32 that the
model is for, of six classes, at most two of a class from a photo, each of the class that covers most of it. Per class 120 to train
on, 40 to validate on, 80 that only the last figure sees, from CamVid's own splits. Every way to start gets the recipe that `auto`
chooses for it, and the same number of epochs, so that the load of the machine does not matter.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repvgg import evaluate
from repvgg.data.masks import CAMVID
from repvgg.measure.machine import write_record

OUT = Path(__file__).with_name("init.json")
CLASSES = ("building", "car", "fence", "pavement", "road", "tree")
EACH = {"train": 120, "val": 40, "test": 80}  # patches a class
SIDE, SHOWN, STEP, COVERS, A_PHOTO = 64, 32, 16, 0.5, 2
STARTS = {
    "new weights": ["--arch", "repvgg_mini", "--init", "none"],
    "cifar10": ["--init", "cifar10", "--allow-deploy"],
}


def make_patches(root: Path, folder: Path) -> None:
    """Write the patches: folder/train/<class>/*.png, and val/ and test/ alike."""
    ids = {CAMVID.index(name): name for name in CLASSES}
    for split, count in EACH.items():
        made = dict.fromkeys(CLASSES, 0)
        for photo in np.random.default_rng(0).permutation(sorted((root / split).glob("*.jpg"))):
            pixels = np.asarray(Image.open(photo).convert("RGB"))
            mask = np.asarray(Image.open(root / f"{split}annot" / f"{photo.stem}.png"))
            here = dict.fromkeys(CLASSES, 0)
            for top in range(0, mask.shape[0] - SIDE + 1, STEP):
                for left in range(0, mask.shape[1] - SIDE + 1, STEP):
                    window = (slice(top, top + SIDE), slice(left, left + SIDE))
                    shares = np.bincount(mask[window].ravel(), minlength=256) / SIDE**2
                    name = ids.get(int(shares.argmax()))
                    if name and shares.max() >= COVERS and here[name] < A_PHOTO and made[name] < count:
                        target = folder / split / name / f"{made[name]:03}.png"
                        target.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(pixels[window]).save(target)
                        here[name] += 1
                        made[name] += 1
        if min(made.values()) < count:
            raise SystemExit(f"{root}: too few patches in {split}: {made}")


def train(photos: Path, run: Path, start: list[str], epochs: int, seed: int) -> dict[str, Any]:
    """Train as a user would, and return how good that is, how long it took, and what was said."""
    words = [*start, "--data", photos, "--image-size", SHOWN, "--epochs", epochs, "--seed", seed, "--out", run, "--no-report"]
    started = time.perf_counter()
    said = subprocess.run([sys.executable, "-m", "repvgg", "train", *map(str, words)], check=True, capture_output=True, text=True)
    spent = (time.perf_counter() - started) / 60
    return {
        "seed": seed,
        "minutes": spent,
        "val_top1": json.loads((run / "summary.json").read_text())["best_top1"],
        "test_top1": evaluate(run / "best.safetensors", photos, split="test").score,
        "chosen": [line for line in said.stderr.splitlines() if line.startswith("auto: ")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CamVid's folder")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in STARTS}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        make_patches(asked.data, photos)
        for seed in range(asked.seeds):
            for number, (name, start) in enumerate(STARTS.items()):
                runs[name].append(train(photos, Path(folder) / f"{number}-{seed}", start, asked.epochs, seed))
                print(name, json.dumps(runs[name][-1]), flush=True)
    counts = {split: count * len(CLASSES) for split, count in EACH.items()}
    what = f"repvgg_mini on patches of CamVid, {SIDE} pixels shrunk to {SHOWN}, of {', '.join(CLASSES)}, by --recipe auto"
    write_record(OUT, {"what": what, "photos": counts, "epochs": asked.epochs, "runs": runs})


if __name__ == "__main__":
    main()
