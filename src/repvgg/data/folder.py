"""A folder of images: <class>/*, or train/<class>/* and val/<class>/*. One of many is listed once, and again only when it
changes."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from repvgg.data import VALIDATION, DataError, Source
from repvgg.data.cache import Arrays, Names, kept, once
from repvgg.data.images import decode
from repvgg.data.listing import Splitting, divided, open_table
from repvgg.disk import IMAGES, LEFT_BEHIND, escaped, is_image, walked
from repvgg.models.manifest import Preprocessing

CALLED = re.compile("train|val|test|dev|eval", re.IGNORECASE)  # how splits are called that are not called like ours
MANY = 20_000  # images: fewer are listed in no time


class Folder:
    """The images of one split; a class is a sub-folder."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; a folder has <class>/*, or train/<class>/* and val/<class>/*")
        found = once(lambda: kept(["images below, 3", str(root.resolve())], _unchanged, lambda: _listing(root)))
        self.classes = list(Names(found["classes"], found["class_ends"]))
        if classes is not None and (extra := sorted(set(self.classes) - set(classes))):
            raise DataError(f"{root}: class {extra[0]!r} has no images to train on; it is missing in train/")
        own = classes or self.classes
        self.root = root
        self.names = Names(found["names"], found["ends"])
        self.labels = np.array([own.index(name) for name in self.classes], dtype=np.int32)[found["labels"]]
        suffixes = ", ".join(sorted(IMAGES))
        if not len(self.names):
            raise DataError(f"{root}: holds no images ({suffixes})")
        if classes is None and (empty := sorted(set(range(len(own))) - set(np.unique(self.labels).tolist()))):
            raise DataError(f"{root}: class {own[empty[0]]!r} has no images ({suffixes})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.root / self.names[index]), int(self.labels[index])


def _listing(root: Path) -> Arrays:
    """Return the names of classes, and of images below the root, and labels.

    For a folder of many, also all its sub-folders with the times of their last change.
    """
    changed = {str(root): _changed(str(root))}  # as they were before they were read: what comes meanwhile is seen the next time
    names, labels, classes = list[str](), list[int](), _folders(root)
    if not classes:
        raise DataError(f"{root}: holds no class folders: put the images of each class into a folder of its name")
    for label, name in enumerate(classes):
        for folder, files in sorted(walked(root / name, above=root, seen=lambda path: changed.setdefault(path, _changed(path)))):
            found = [f"{folder}/{file}".removeprefix(f"{root}/") for file in sorted(files)]
            names += filter(is_image, found)
            labels += [label] * (len(names) - len(labels))
    watched = changed if len(names) >= MANY else {}
    images, kinds, folders = Names.of(names), Names.of(classes), Names.of(list(watched))
    return {
        "names": images.joined,
        "ends": images.ends,
        "labels": np.array(labels, dtype=np.int32),
        "classes": kinds.joined,
        "class_ends": kinds.ends,
        "folders": folders.joined,
        "folder_ends": folders.ends,
        "changed": np.array(list(watched.values()), dtype=np.int64),
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


def open_files(path: Path, val: float | None = None, seed: int = 0) -> Source:
    """Open a folder of class folders, or a table of paths and labels (see `open_source`)."""
    how = None if val is None else Splitting(val, seed)
    if path.suffix.lower() == ".csv" and not path.is_dir():
        return open_table(path, how)
    held = next((path / name for name in VALIDATION if is_split(path / name)), None)
    if held is None:
        root = path / "train" if is_split(path / "train") else path
        if root is path:
            _refuse_splits(path)
        everything = Folder(root)
        names = [name if root is path else f"train/{name}" for name in everything.names]
        classes = [escaped(name) for name in everything.classes]
        found = divided(str(path), everything, names, everything.labels.tolist(), classes, how or Splitting(seed=seed))
        tested = root != path and _has_classes(path / "test")
        return replace(found, test=Folder(path / "test", everything.classes)) if tested else found
    if how is not None:
        raise DataError(f"--val: {path} has a validation split of its own, {held.name}/")
    if not (path / "train").is_dir():
        raise DataError(f"{path}: has no train/: to evaluate on {held.name}/ alone, name that, with --split all")
    train = Folder(path / "train")
    test = Folder(path / "test", train.classes) if _has_classes(path / "test") else None  # else their labels are not known
    return Source(
        str(path), train, Folder(held, train.classes), [escaped(name) for name in train.classes], Preprocessing(), test=test
    )


def is_split(folder: Path) -> bool:
    """Tell a split from a class of that name: it holds class folders, or lies beside a train/ that does."""
    beside = folder.with_name("train")
    return folder.is_dir() and (_has_classes(folder) or _has_classes(beside))


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and bool(_folders(folder))


def _folders(path: str | Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(LEFT_BEHIND))


def _refuse_splits(path: Path) -> None:
    """Raise DataError where the class folders are called like splits and all hold a sub-folder of one name, which is a class."""
    names = _folders(path)
    if len(names) > 1 and all(map(CALLED.search, names)) and set.intersection(*(set(_folders(path / name)) for name in names)):
        raise DataError(f"{path}: {', '.join(f'{name}/' for name in names)} look like splits: call them train/, val/ and test/")
