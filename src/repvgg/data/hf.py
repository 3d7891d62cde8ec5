"""Hugging Face data sets: a name on the hub, or a local folder of parquet files."""

from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from repvgg.data import VALIDATION, DataError, Images, InMemory, Source
from repvgg.data.images import ImageError, decode
from repvgg.disk import in_a_line
from repvgg.models.manifest import Preprocessing
from repvgg.terminal import printable

HELD_OUT = (*VALIDATION, "test")  # splits to validate on, the first that is there
LABELS = ("label", "labels", "class", "target", "cls")  # what a column of integers is called that are labels
SMALL = 64  # pixels: images of at most this size are decoded once and kept in memory
CIFAR10 = Preprocessing((3, 32, 32), 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


class Encoded:
    """Images decoded each time they are asked for."""

    def __init__(self, table: Any, image: str, labels: list[int]) -> None:
        self.table, self.image, self.labels = table, image, labels

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        cell = self.table[index][self.image] or {"bytes": b"", "path": None}  # a row without an image
        source = cell["bytes"] if cell["bytes"] is not None else cell["path"]
        return decode(source, name=cell["path"] or f"image {index}")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels(index), self.labels[index]


def open_hf(name: str) -> Source:
    """`name`: a hub name or a local folder; it needs an image column, a label column, a train and a validation or test split."""
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise DataError(f"{name}: no such folder")
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library raises many types; each is a reason in words
        reason = in_a_line(error)
        raise DataError(f"hf:{name}: cannot be opened ({reason})") from None
    if "train" not in splits:
        raise DataError(f"hf:{name}: has no split called train (it has {', '.join(splits)})")
    held_out = next((s for s in HELD_OUT if s in splits), None)
    if held_out is None:
        raise DataError(f"hf:{name}: has no {', '.join(HELD_OUT)} split to evaluate on")
    image, label, classes = columns(f"hf:{name}", splits["train"].features)
    train, val = (_images(f"hf:{name}, {s}", splits[s], image, label) for s in ("train", held_out))
    if classes is None:
        refuse_ids(f"hf:{name}", label, {*train[1], *val[1]})
        classes = [str(i) for i in range(max(train[1]) + 1)]
    for split, labels in (("train", train[1]), (held_out, val[1])):
        if wrong := [x for x in set(labels) if not 0 <= x < len(classes)]:
            raise DataError(f"hf:{name}: label {wrong[0]} in {split}, but there are {len(classes)} classes")
    if unseen := sorted(set(val[1]) - set(train[1])):
        raise DataError(f"hf:{name}: class {classes[unseen[0]]!r} has no images to train on")
    test = None
    # Many of the hub's have test splits without labels.
    if held_out != "test" and "test" in splits and set(splits["test"][label]) <= {*range(len(classes))}:
        test, _ = _images(f"hf:{name}, test", splits["test"], image, label)
    small = isinstance(train[0], InMemory)
    is_cifar10 = small and len(classes) == 10 and tuple(train[0].pixels.shape[1:]) == (3, 32, 32)  # type: ignore[attr-defined]
    size = train[0].pixels.shape[-1] if isinstance(train[0], InMemory) else 224
    preprocessing = CIFAR10 if is_cifar10 else Preprocessing((3, size, size), size) if small else Preprocessing()
    return Source(f"hf:{name}", train[0], val[0], classes, preprocessing, "cifar" if small else "light", test=test)


def columns(name: str, features: Any) -> tuple[str, str, list[str] | None]:
    """Find the columns as `find_columns` does. Raises DataError where one is missing."""
    image, label, classes = find_columns(features)
    if image is None or label is None:
        there = ", ".join(f"{column} ({getattr(f, 'dtype', type(f).__name__)})" for column, f in features.items())
        called = f"{', '.join(LABELS[:-1])} or {LABELS[-1]}"
        raise DataError(
            f"{name}: needs a column of images and one of labels (ClassLabel, or integers called {called}); it has {there}"
        )
    return image, label, classes


def refuse_ids(name: str, column: str, labels: set[int]) -> None:
    """Raise DataError for integers without names that number no classes: few of a wide range."""
    if max(labels) > 1000 + 10 * len(labels):
        raise DataError(
            f"{name}: column {column!r} holds {len(labels):,} distinct integers from {min(labels)} to {max(labels)}, which are "
            "ids: number the classes from 0 in a row, or make it a ClassLabel"
        )


def find_columns(features: Any) -> tuple[str | None, str | None, list[str] | None]:
    """Return the columns of images and of labels, and the names of the classes; None for what is not there."""
    image = next((c for c, f in features.items() if isinstance(f, datasets.Image)), None)
    labels = {c: f for c, f in features.items() if isinstance(f, datasets.ClassLabel)}
    integers = [c for c, f in features.items() if getattr(f, "dtype", "").startswith(("int", "uint"))]
    label = next(iter(labels), next((c for c in integers if c in LABELS), None))
    return image, label, list(map(printable, labels[label].names)) if label in labels else None


def _images(name: str, table: Any, image: str, label: str) -> tuple[Images, list[int]]:
    table = table.cast_column(image, datasets.Image(decode=False))
    labels = list(table[label])
    if not labels or None in labels:
        raise DataError(f"{name}: holds {'images without a label' if labels else 'no images'}")
    encoded = Encoded(table, image, labels)
    found = (_shape(encoded, i) for i in (0, len(labels) // 2, len(labels) - 1))
    shapes = {shape for shape in found if shape is not None}
    if len(shapes) != 1 or max(max(shape[1:]) for shape in shapes) > SMALL:
        return encoded, labels
    return InMemory(encoded.pixels, labels, shapes.pop()), labels


def _shape(encoded: Encoded, index: int) -> tuple[int, ...] | None:
    """Return the shape of an image; None where it cannot be read, which is told when it is asked for."""
    try:
        return tuple(encoded.pixels(index).shape)
    except ImageError:
        return None
