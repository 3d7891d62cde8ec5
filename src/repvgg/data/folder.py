"""A folder of images: train/<class>/*, val/<class>/*. One of many images is listed once, and again only when it changes."""

import os
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets import ImageFolder

from repvgg.data import DataError, Source
from repvgg.data.cache import Arrays, Names, kept
from repvgg.data.images import SUFFIXES, decode, is_image
from repvgg.disk import escaped
from repvgg.models.manifest import Preprocessing

MANY = 20_000  # images: fewer are listed in no time


class Folder:
    """The images of one split; a class is a sub-folder."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; a class folder has train/<class>/* and val/<class>/*")
        found = kept(["folder", str(root.resolve())], _unchanged, lambda: _listing(root))
        self.classes = list(Names(found["classes"], found["class_ends"]))
        if classes is not None and (extra := sorted(set(self.classes) - set(classes))):
            raise DataError(f"{root}: class {extra[0]!r} has no images to train on; it is missing in train/")
        own = classes or self.classes
        self.names = Names(found["names"], found["ends"])
        self.labels = np.array([own.index(name) for name in self.classes], dtype=np.int32)[found["labels"]]
        suffixes = ", ".join(sorted(SUFFIXES))
        if not len(self.names):
            raise DataError(f"{root}: holds no images ({suffixes})")
        if classes is None and (empty := sorted(set(range(len(own))) - set(np.unique(self.labels).tolist()))):
            raise DataError(f"{root}: class {own[empty[0]]!r} has no images ({suffixes})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.names[index]), int(self.labels[index])


def _listing(root: Path) -> Arrays:
    """Names of classes and images, labels; and for a folder of many, all its sub-folders with the times of their last change."""
    try:
        folder = ImageFolder(str(root), is_valid_file=lambda p: is_image(Path(p)), allow_empty=True)
    except FileNotFoundError:
        raise DataError(f"{root}: holds no class folders") from None
    names, classes = Names.of([path for path, _ in folder.samples]), Names.of(folder.classes)
    folders = [path for path, _, _ in os.walk(root, followlinks=True)] if len(names) >= MANY else []
    watched = Names.of(folders)
    return {
        "names": names.joined,
        "ends": names.ends,
        "labels": np.array([label for _, label in folder.samples], dtype=np.int32),
        "classes": classes.joined,
        "class_ends": classes.ends,
        "folders": watched.joined,
        "folder_ends": watched.ends,
        "changed": np.array([_changed(path) for path in folders], dtype=np.int64),
    }


def _unchanged(found: Arrays) -> bool:
    """A file that comes or goes changes its folder's time."""
    folders = Names(found["folders"], found["folder_ends"])
    return len(folders) > 0 and all(_changed(path) == time for path, time in zip(folders, found["changed"], strict=True))


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return -1


def open_folder(root: Path) -> Source:
    train = Folder(root / "train")
    val = Folder(root / "val", train.classes)
    return Source(str(root), train, val, [escaped(name) for name in train.classes], Preprocessing())
