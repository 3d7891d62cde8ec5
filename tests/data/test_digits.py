"""data/digits.py against scikit-learn's own copy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from repvgg.data import DataError, open_source
from repvgg.data.digits import SIZE, open_digits
from repvgg.data.transforms import Transformed, eval_transform, normalise


def test_the_digits_are_those_of_scikit_learn() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    source = open_digits()
    held_out = np.arange(1797) % 5 == 0
    assert (len(source.train), len(source.val)) == (1437, 360)
    for split, mask in ((source.train, ~held_out), (source.val, held_out)):
        pixels, labels = zip(*(split[i] for i in range(len(split))), strict=True)
        assert list(labels) == bunch.target[mask].tolist()
        grey = torch.stack(pixels)
        assert grey.dtype == torch.uint8
        assert np.abs(grey.squeeze(1).numpy() - bunch.images[mask] * 255 / 16).max() <= 0.5
    assert source.classes == [str(name) for name in bunch.target_names]


def test_normalised_digits_have_mean_0_and_deviation_1() -> None:
    source = open_digits()
    scans = Transformed(source.train, eval_transform(source.preprocessing))
    images = normalise(torch.stack([scans[i][0] for i in range(len(scans))]), source.preprocessing)
    assert images.shape == (1437, 1, SIZE, SIZE)
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.05


def test_a_run_folder_of_their_name_does_not_hide_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--data digits --out digits` leaves one; a folder of images of that name is meant where there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match="digits"):
        open_source("digits")
    (tmp_path / "digits" / "settings.json").write_text("{}")
    assert len(open_source("digits").train) == 1437
