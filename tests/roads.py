"""Made-up roads with masks, in the layouts of CamVid and Cityscapes: a few small pictures that a narrow net can learn."""

from pathlib import Path

import numpy as np
from PIL import Image

SKY, ROAD, CAR, UNLABELLED = 0, 3, 8, 11  # CamVid's ids
COLOURS = {SKY: (90, 140, 220), ROAD: (110, 100, 110), CAR: (200, 30, 40), UNLABELLED: (0, 0, 0)}


def road(number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A photo [H, W, 3] and its mask [H, W]: sky above a road, a car on it, a strip without a label."""
    random = np.random.default_rng(number)
    height, width = size
    mask = np.full(size, SKY, np.uint8)
    horizon = random.integers(height // 3, height // 2)
    mask[horizon:] = ROAD
    left = random.integers(0, width // 2)
    mask[horizon + height // 8 : horizon + height // 4, left : left + width // 3] = CAR
    mask[:, : width // 16] = UNLABELLED
    photo = np.array([COLOURS[i] for i in range(12) if i in COLOURS])[np.searchsorted(sorted(COLOURS), mask)]
    return (photo + random.normal(0, 12, photo.shape)).clip(0, 255).astype(np.uint8), mask


def make_camvid(root: Path, train: int = 8, val: int = 4, test: int = 3, size: tuple[int, int] = (48, 64)) -> Path:
    for split, count in (("train", train), ("val", val), ("test", test)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            photo, mask = road(1000 * len(split) + i, size)
            Image.fromarray(photo).save(root / split / f"{split}_{i:03d}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{split}_{i:03d}.png")
    return root


def make_cityscapes(root: Path, size: tuple[int, int] = (32, 64)) -> Path:
    """Both splits as the download has them: cities, three files of ground truth for each photo, raw ids from 0 to 33."""
    raw = {SKY: 23, ROAD: 7, CAR: 26, UNLABELLED: 4}
    for split, cities in (("train", ("aachen", "bremen")), ("val", ("lindau",))):
        for city in cities:
            photos, truth = (root / kind / split / city for kind in ("leftImg8bit", "gtFine"))
            photos.mkdir(parents=True)
            truth.mkdir(parents=True)
            for i in range(2):
                photo, mask = road(sum(map(ord, city)) + i, size)
                name = f"{city}_{i:06d}_000019"
                ids = np.vectorize(raw.get)(mask).astype(np.uint8)
                Image.fromarray(photo).save(photos / f"{name}_leftImg8bit.png")
                Image.fromarray(ids).save(truth / f"{name}_gtFine_labelIds.png")
                Image.fromarray(photo).save(truth / f"{name}_gtFine_color.png")
                Image.fromarray(ids.astype(np.uint16) * 1000).save(truth / f"{name}_gtFine_instanceIds.png")
                (truth / f"{name}_gtFine_polygons.json").write_text("{}")
    return root
