"""bench/data.py: every stage is timed on the images it is said to be."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from repvgg.bench.data import data_speeds
from repvgg.data import open_source
from repvgg.models.manifest import Preprocessing
from repvgg.train.recipes import Recipe, get_recipe


def test_small_images_have_no_workers() -> None:
    speeds = data_speeds(open_source("digits"), get_recipe("demo"), workers=2, count=256)
    assert list(speeds) == ["batches", "to device"]
    assert all(speed > 0 for speed in speeds.values())


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
