"""Photos with a mask of class ids each: camvid:ROOT and cityscapes:ROOT.

camvid       {train,val,test}/NAME.jpg, {train,val,test}annot/NAME.png: ids 0 to 10, 11 has no label
cityscapes   leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png, gtFine/.../NAME_gtFine_labelIds.png: raw ids; 19 are trained

What has no label is 255 here, whatever it was in the file. Every photo must have its mask and its size, and every id must be
known, before training begins; that is found out once, and again when a file changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Mask

from repvgg.data import DataError, Source
from repvgg.data.cache import kept, once
from repvgg.data.images import LONGEST, ImageError, decode, decode_mask, size_of
from repvgg.disk import images_below
from repvgg.models.manifest import Preprocessing

IGNORED = 255
CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]


@dataclass(frozen=True)
class Ids:
    """The ids in mask files, and what they are in training.

    classes: names by their number in training. train_id: [256], that number for each id in a file, `IGNORED` where it has no
    label, -1 where there is no such id.
    """

    classes: list[str]
    train_id: Any

    def read(self, path: Path) -> Tensor:
        """Return a mask file, uint8 [H, W]. Raises `ImageError` naming the file and the id that it should not have."""
        raw = decode_mask(path)
        ids = self.train_id[raw.numpy()]
        if ids.min() < 0:
            wrong = int(raw.numpy()[ids < 0][0])
            known = np.flatnonzero(self.train_id >= 0)
            raise ImageError(f"{path}: class id {wrong}; ids are from {known.min()} to {known.max()}")
        return torch.from_numpy(ids.astype(np.uint8))


class Masked:
    """The photos and masks of one split."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], ids: Ids) -> None:
        self.pairs, self.ids = pairs, ids

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Mask]:
        photo, mask = self.pairs[index]
        image, ids = decode(photo), self.ids.read(mask)
        if image.shape[1:] != ids.shape:
            raise ImageError(_unequal(photo, image.shape[1:], mask, ids.shape))
        return image, Mask(ids)


def open_camvid(root: Path) -> Source:
    """Open the layout that SegNet's authors made: 367 photos to train on, 101 and 233 to evaluate."""
    ids = np.full(256, -1)
    ids[: len(CAMVID)], ids[len(CAMVID)] = range(len(CAMVID)), IGNORED
    splits = [_camvid_pairs(root, split) for split in ("train", "val", "test")]
    return _source(f"camvid:{root}", splits, Ids(CAMVID, ids), "camvid")


def _camvid_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    photos, masks = root / split, root / f"{split}annot"
    if split == "test" and not (photos.is_dir() and masks.is_dir()):
        return []
    return _paired(_images(photos), _images(masks), lambda photo: masks / f"{photo.stem}.png")


def open_cityscapes(root: Path) -> Source:
    """Open the layout that torchvision reads: 2,975 photos to train on, 500 to evaluate; those of the test split have no masks."""
    from torchvision.datasets import Cityscapes

    ids, classes = np.full(256, -1), {}
    for c in Cityscapes.classes:
        if c.id >= 0:
            ids[c.id] = c.train_id if 0 <= c.train_id < IGNORED else IGNORED
        if 0 <= c.train_id < IGNORED:
            classes[c.train_id] = c.name
    splits = [_cityscapes_pairs(root, split) for split in ("train", "val")]
    return _source(f"cityscapes:{root}", splits, Ids([classes[i] for i in range(len(classes))], ids), "pspnet")


def _cityscapes_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    photos, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    ending, mask_ending = "_leftImg8bit.png", "_gtFine_labelIds.png"
    return _paired(
        [path for path in _images(photos) if path.name.endswith(ending)],
        [path for path in _images(masks) if path.name.endswith(mask_ending)],
        lambda photo: masks / photo.parent.name / (photo.name.removesuffix(ending) + mask_ending),
    )


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return [folder / name for name in images_below(folder)]


def _paired(photos: Sequence[Path], masks: Sequence[Path], mask_of: Any) -> list[tuple[Path, Path]]:
    """Raises `DataError` naming a photo without its mask, or a mask without its photo."""
    pairs, there = [(photo, mask_of(photo)) for photo in photos], set(masks)
    for photo, mask in pairs:
        if mask not in there:
            raise DataError(f"{photo}: has no mask, {mask} is missing")
    if alone := sorted(there - {mask for _, mask in pairs}):
        raise DataError(f"{alone[0]}: is a mask without a photo")
    return pairs


def _source(name: str, splits: Sequence[Sequence[tuple[Path, Path]]], ids: Ids, recipe: str) -> Source:
    for split, pairs in zip(("train", "val"), splits, strict=False):
        if not pairs:
            raise DataError(f"{name}: there are no images in {split}")
    everything = [pair for pairs in splits for pair in pairs]
    pixels = once(lambda: kept(["masks", *map(_stamp, everything)], lambda found: True, lambda: _verified(everything, ids)))
    if not pixels["labelled"][: len(splits[0])].any():
        raise DataError(f"{name}: no pixel to train on has a label")
    height, width = size_of(splits[0][0][0])
    train, val, *test = (Masked(pairs, ids) for pairs in splits)
    preprocessing = Preprocessing((3, height, width), min(height, width))
    return Source(name, train, val, ids.classes, preprocessing, recipe, masks=True, test=test[0] if test and len(test[0]) else None)


def _stamp(pair: tuple[Path, Path]) -> str:
    return " ".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in pair)


def _verified(pairs: Sequence[tuple[Path, Path]], ids: Ids) -> dict[str, Any]:
    """Count the pixels of each mask that have a label. Raises `ImageError` naming a file that cannot be trained on."""
    labelled = []
    for photo, path in pairs:
        mask, size = ids.read(path), size_of(photo)
        if mask.shape != size:
            raise ImageError(_unequal(photo, size, path, mask.shape))
        if max(size) > LONGEST * min(size):
            raise ImageError(f"{photo}: is more than {LONGEST} times as long as wide")
        labelled.append(int((mask != IGNORED).sum()))
    return {"labelled": np.array(labelled)}


def _unequal(photo: Path, size: Sequence[int], mask: Path, mask_size: Sequence[int]) -> str:
    return f"{photo}: has {size[1]} x {size[0]} pixels, its mask {mask} {mask_size[1]} x {mask_size[0]}"


class ToNetwork(nn.Module):
    """A photo at the size that the network sees it in, whole; its mask, if there is one, as it is."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.resize = v2.Resize(preprocessing.resize, InterpolationMode(preprocessing.interpolation), antialias=True)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Any:
        if max(image.shape[-2:]) > LONGEST * min(image.shape[-2:]):
            raise ImageError(f"is more than {LONGEST} times as long as wide")
        image = self.resize(image)
        return image if mask is None else (image, mask.as_subclass(Tensor))
