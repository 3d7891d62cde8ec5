"""CIFAR-100's folder form, train/ and val/ with a folder for each of 100 classes of 32-pixel images, from training to its page."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import repvgg
from repvgg.models.zoo import manifest_of

NAMES = [f"{kind}_{number:02d}" for kind in ("apple", "whale") for number in range(50)]
EACH = {"train": 4, "val": 2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Stand-ins for its images: of each class the same coarse pattern, with noise."""
    random = np.random.default_rng(0)
    for name in NAMES:
        pattern = random.integers(30, 226, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        for split, count in EACH.items():
            folder = tmp_path / "cifar100" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noisy = pattern + random.integers(-30, 30, (32, 32, 3))
                Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "cifar100"


@pytest.mark.slow
def test_a_hundred_classes_from_folders_to_the_page(photos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    how: dict[str, Any] = {"epochs": 1, "width": 0.25, "init": "none", "precision": "fp32", "log": said.append}
    run = repvgg.train("repvgg_micro", photos, tmp_path / "run", **how)
    assert said[0].startswith("auto: 400 images to train on in 100 classes, their short sides about 32 pixels")
    model = repvgg.load(tmp_path / "run" / "last.safetensors")
    manifest = manifest_of(model)
    assert manifest.classes == NAMES
    assert manifest.preprocessing.input_size == (3, 32, 32)
    assert (manifest.arch or {})["small_input"]
    accuracy: Any = repvgg.evaluate(tmp_path / "run", photos)
    assert accuracy.images == EACH["val"] * len(NAMES)
    assert accuracy.classes == tuple(NAMES)
    assert accuracy.confusion.shape == (100, 100)
    assert accuracy.confusion.sum(1).tolist() == [EACH["val"]] * len(NAMES)
    assert accuracy.confusion.tolist() == run.best.confusion.tolist()
    page = (tmp_path / "run" / "run.html").read_text()
    assert [name for name in NAMES if not re.search(rf"<td[^>]*>{name}</td>", page)] == []
    (answer,) = repvgg.predict(tmp_path / "run", photos / "val" / "whale_07" / "0.png", top=5)
    assert len(answer.labels) == 5  # type: ignore[union-attr]
