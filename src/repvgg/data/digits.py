"""Handwritten digits, embedded: 1,797 scans of 8x8 pixels by 43 writers.

They are the test set of

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (CC BY 4.0),
as scikit-learn distributes it. Every fifth scan is held out: 1,437 for training, 360 for validation.
"""

from importlib.resources import files

import numpy as np
import torch

from repvgg.data import Decoded, Source
from repvgg.models.manifest import Preprocessing

SIZE = 16  # pixels a side, twice the scan's: enough for four halvings


def open_digits() -> Source:
    with files("repvgg.data").joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        grey, labels = arrays["images"], arrays["labels"]  # 0 to 16
    images = torch.from_numpy((grey.astype(np.float32) * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    held_out = np.arange(len(labels)) % 5 == 0
    train, val = (Decoded(images[torch.from_numpy(m)], labels[m].tolist()) for m in (~held_out, held_out))
    preprocessing = Preprocessing((1, SIZE, SIZE), SIZE, mean=(0.305,), std=(0.319,))
    return Source("digits", train, val, [str(digit) for digit in range(10)], preprocessing, recipe="demo")
