"""Models and photos that the tests of predictions share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image

import repvgg
from repvgg.data import open_source
from repvgg.models.manifest import Preprocessing
from repvgg.predict.job import Job
from repvgg.train.loop import new_model


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """grey.safetensors reads digits, colour.safetensors photos of three classes, masks.safetensors roads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    grey = randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16))
    repvgg.save(grey, folder / "grey.safetensors")
    colour = randomize(repvgg.create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True), (32, 3, 32, 32))
    p = Preprocessing((3, 32, 32), 36)
    repvgg.save(colour, folder / "colour.safetensors", classes=["cat", "dog", "owl"], preprocessing=p)
    masks = randomize(repvgg.create_model("pspnet_repvgg_micro_fast", num_classes=11, width=0.25), (2, 3, 48, 64))
    repvgg.save(masks, folder / "masks.safetensors", preprocessing=Preprocessing((3, 48, 48), 48))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """val/{cat,dog}/*.png, of which one cannot be read."""
    random = np.random.default_rng(0)
    for i in range(11):
        path = tmp_path / f"photos/val/{('cat', 'dog')[i % 2]}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        smooth.resize((40 + i, 50), Image.Resampling.BICUBIC).save(path)
    (tmp_path / "photos/val/dog/07.png").write_bytes(b"damaged")
    return tmp_path / "photos"


@pytest.fixture
def job(files: Path, tmp_path: Path) -> Job:
    return Job(str(files / "grey.safetensors"), "digits", str(tmp_path / "preds.parquet"), part_size=50, batch_size=16)
