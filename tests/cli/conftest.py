"""A trained run folder and held-out scans, for all tests of the commands."""

import io
from pathlib import Path

import pytest
from commands import TRAIN, repvgg
from PIL import Image

from repvgg.data import open_source


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run folder, and its deploy form beside it."""
    out = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", io.StringIO())
        patch.setattr("sys.stdout", io.StringIO())
        assert repvgg(*TRAIN.split(), "--epochs", 3, "--batch-size", 32, "--out", out / "run") == 0
        assert repvgg("convert", out / "run/best.safetensors", out / "deploy.safetensors") == 0
    return out


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scans as files, each named by its number and label."""
    folder = tmp_path_factory.mktemp("scans")
    source = open_source("digits")
    for i in range(6):
        image, label = source.val[i]
        Image.fromarray(image[0].numpy()).save(folder / f"{i}-{label}.png")
    return folder
