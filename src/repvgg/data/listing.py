"""Images in one heap: divided into training and validation by what they are called, or as a table says.

source = open_table(Path("photos.csv"))               # columns path and label, and split (train, val, test) where it is known
indices = held_out(names, labels, Splitting(0.2))     # stratified: of each class the same share

A run keeps its division in its folder (split.csv), and goes on with it whatever becomes of the data meanwhile.
"""

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from repvgg.data import DataError, Images, Source, Subset
from repvgg.data.images import decode
from repvgg.disk import escaped, read_text, unescaped
from repvgg.models.manifest import Preprocessing

SPLIT = "split.csv"  # in a run folder: the division that it goes by
SPLITS = ("train", "val", "test")
FORMULA = ("=", "+", "-", "@")  # how cells begin that a spreadsheet computes, whoever has named the file
Row = tuple[str, str, str]  # path below the data's folder, class, split


@dataclass(frozen=True)
class Splitting:
    """The share of each class's images that is held out for validation, and the seed of the draw."""

    val: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.val < 1:
            raise DataError(f"--val {self.val}: a fraction of the images, above 0 and below 1, such as 0.2")


def held_out(names: Sequence[str], labels: Sequence[int], how: Splitting) -> set[int]:
    """Return the numbers of the images to validate on: of each class the same share, at least one, but never all.

    The draw is a function of the seed and an image's own name, so that few change sides when images are added.
    """
    by_class: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        digest = hashlib.sha256(f"{how.seed}/{name}".encode(errors="surrogateescape")).digest()
        by_class[int(label)].append((digest, i))
    chosen: set[int] = set()
    for images in by_class.values():
        count = min(max(1, round(how.val * len(images))), len(images) - 1)
        chosen.update(i for _, i in sorted(images)[:count])
    if not chosen:
        raise DataError("no class has two images: there is nothing to hold out for validation")
    return chosen


def divided(source: str, images: Images, names: Sequence[str], labels: Sequence[int], classes: list[str], how: Splitting) -> Source:
    """Return the source of images that have no division yet."""
    val = held_out(names, labels, how)
    splits = ["val" if i in val else "train" for i in range(len(names))]
    return assembled(source, images, names, labels, classes, splits, how)


def assembled(
    source: str,
    images: Images,
    names: Sequence[str],
    labels: Sequence[int],
    classes: list[str],
    splits: Sequence[str],
    how: Splitting | None,
) -> Source:
    """Return the source of images whose division is known. Raises `DataError` for a class without images to train on."""
    parts = {split: [i for i, s in enumerate(splits) if s == split] for split in SPLITS}
    for split in ("train", "val"):
        if not parts[split]:
            raise DataError(f"{source}: no image has the split {split}")
    trained = {labels[i] for i in parts["train"]}
    if missing := [name for number, name in enumerate(classes) if number not in trained]:
        raise DataError(f"{source}: class {missing[0]!r} has no images to train on")
    train, val, test = (Subset(images, parts[split]) if parts[split] else None for split in SPLITS)
    assert train is not None
    assert val is not None

    def rows() -> list[Row]:
        return [(name, classes[label], split) for name, label, split in zip(names, labels, splits, strict=True)]

    return Source(
        source, train, val, classes, Preprocessing(), test=test, splitting=(how.val, how.seed) if how else None, rows=rows
    )


# ------------------------------------------------------------------------------------------------------------------- tables


class Listed:
    """Images by their paths."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
        self.root, self.names, self.labels = root, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.root / self.names[index]), self.labels[index]


def open_table(path: Path, how: Splitting | None = None, root: Path | None = None, name: str = "") -> Source:
    """Open images that a CSV lists. Paths are relative to `root`, by default the table's folder.

    how: for a table without a column `split`; by default `Splitting()`. Raises `DataError` for a table that names no images.
    """
    own = root is not None  # written by a run: cells are what they are, classes escaped already
    root, name = root or path.parent, name or str(path)
    lines, columns = _columns(path, trim=not own)
    names, labels, splits = columns["path"], columns["label"], columns.get("split")
    if own:
        labels = [unescaped(label) for label in labels]
    if splits is not None and how is not None:
        raise DataError(f"{path}: has a column split: leave out --val")
    for line, image in zip(lines, names, strict=True):
        if not (root / image).is_file():
            remedy = ": put it back, or give another --out, or --resume never" if own else ""
            raise DataError(f"{path}, line {line}: there is no image {escaped(str(root / image))}{remedy}")
    first: dict[str, tuple[int, str, str]] = {}
    for line, image, label, split in zip(lines, names, labels, splits or [""] * len(names), strict=True):
        before, *was = first.setdefault(image, (line, label, split))
        if was != [label, split]:
            also = f"line {before} has {escaped(image)} too, with another label or split"
            raise DataError(f"{path}, line {line}: {also}: an image has one row (to predict, name the folder)")
    classes = sorted(set(labels))
    number = {label: i for i, label in enumerate(classes)}
    numbers = [number[label] for label in labels]
    images, shown = Listed(root, names, numbers), [escaped(label) for label in classes]
    if splits is None:
        return divided(name, images, names, numbers, shown, how or Splitting())
    if wrong := sorted(set(splits) - set(SPLITS)):
        raise DataError(f"{path}: split {escaped(wrong[0])!r}: there are {', '.join(SPLITS)}")
    return assembled(name, images, names, numbers, shown, splits, None)


def reopened(source: Source, run: Path, val: float | None = None) -> Source:
    """Return a source divided as it was when the run in a folder began; as it is where there is none, or it has splits of its own.

    Raises `DataError` for another share to hold out.
    """
    table = run / SPLIT
    if source.splitting is None or not table.is_file():
        return source
    settings = json.loads(read_text(run / "settings.json")) if (run / "settings.json").exists() else {}
    began = tuple(settings.get("splitting") or source.splitting)
    if val not in (None, began[0]):
        raise DataError(f"{run}: holds a run with --val {began[0]}, not {val}: another --out, or --resume never")
    root = Path(source.name)
    found = open_table(table, root=root.parent if root.suffix.lower() == ".csv" else root, name=source.name)
    return replace(found, splitting=began, test=source.test if found.classes == source.classes else None)


def _columns(path: Path, trim: bool) -> tuple[list[int], dict[str, list[str]]]:
    """Return the lines of a table's rows, and its columns that are known; trim: without the space around their cells."""
    try:
        table = csv.DictReader(
            io.StringIO(path.read_text(encoding="utf-8-sig", errors="surrogateescape"), newline=""), skipinitialspace=trim
        )
        rows = [(table.line_num, row) for row in table]
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    wanted = ("path", "label", "split")
    header = table.fieldnames or []
    if not {"path", "label"} <= set(header):
        raise DataError(
            f"{path}: needs a first line that names the columns path and label, and split if there is one, separated by commas"
        )
    for line, row in rows:
        if any(not (row[name] or "").strip() for name in wanted if name in header):
            raise DataError(f"{path}, line {line}: a cell of path, label or split is empty")
    if not rows:
        raise DataError(f"{path}: lists no images")
    found = {name: [row[name].strip() if trim else row[name] for _, row in rows] for name in wanted if name in header}
    return [line for line, _ in rows], found


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a division as `open_table` reads it."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file, quoting=csv.QUOTE_ALL)
        table.writerow(("path", "label", "split"))
        for name, label, split in rows:
            table.writerow((f"./{name}" if name.startswith(FORMULA) else name, _no_formula(label), split))


def _no_formula(label: str) -> str:
    """Return a label as `escaped` might spell it, in which no spreadsheet sees a formula."""
    return f"\\x{ord(label[0]):02x}{label[1:]}" if label.startswith(FORMULA) else label
