"""bench/data.py: every stage is timed on the images it is said to be."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from repvgg.bench.data import data_speeds
from repvgg.data import Source, open_source
from repvgg.models.manifest import Preprocessing
from repvgg.train.recipes import Recipe, get_recipe


def test_small_images_have_no_workers() -> None:
    speeds = data_speeds(open_source("digits"), get_recipe("demo"), workers=2, count=256)
    assert list(speeds) == ["batches", "to device"]
    assert all(speed > 0 for speed in speeds.values())


class Slow:
    """Images that take 20 ms each."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.02)
        return torch.zeros(3, 32, 32, dtype=torch.uint8), 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_that_were_ready_before_are_not_counted(workers: int) -> None:
    """Three workers begin together: their first batches come at once."""
    images = Slow()
    source = Source("slow", images, images, ["a"], Preprocessing((3, 32, 32), 32))
    speed = data_speeds(source, Recipe(batch_size=4), workers=workers, count=8)["batches"]
    assert speed < 2 * max(1, workers) / 0.02


def test_photos_are_timed_stage_by_stage(tmp_path: Path) -> None:
    for number in range(8):
        for split in ("train", "val"):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((60, 40), 50).convert("RGB").save(path)
    source = replace(open_source(str(tmp_path)), preprocessing=Preprocessing((3, 32, 32), 32))
    speeds = data_speeds(source, Recipe(batch_size=2), count=8)
    assert list(speeds) == ["decode", "augment", "collate", "batches", "to device"]
    assert all(speed > 0 for speed in speeds.values())
    with pytest.raises(ValueError, match="--images 0: at least 1"):
        data_speeds(source, Recipe(batch_size=2), count=0)
