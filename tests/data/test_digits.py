"""data/digits.py against scikit-learn's own copy."""

import numpy as np
import pytest
import torch

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
