"""A data set as shards of images to predict: each image with a key, and with its label if it has one.

shards = open_shards("wds:photos", "val")
for item in shards.read(0):
    item.key, item.label, item.image          # "val-000.tar/00017", 3, encoded bytes

Unlike a source to train on (`open_source`), it is not read through beforehand and needs neither labels nor other splits. A shard
is a file of WebDataset or hf-stream, else a number of images in a row. Which images a shard holds depends on nothing but the data.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from repvgg.data import VALIDATION, DataError, open_source, tars
from repvgg.data.cifar10 import HUB_NAME
from repvgg.data.folder import is_split
from repvgg.data.hf import HELD_OUT, find_columns
from repvgg.data.listing import Listed
from repvgg.data.stream import expanded, fetched, refuse_damaged
from repvgg.disk import describe, escaped, images_below, in_a_line
from repvgg.terminal import printable


@dataclass(frozen=True)
class Item:
    """One image: encoded bytes, a path, or pixels, uint8 [C, H, W]. key: its name in the data, unique. label: the name of its
    class; its number where the data has no names; None where it has no label. Names are printable (`repvgg.disk.escaped`)."""

    key: str
    label: str | int | None
    image: bytes | str | Tensor


@dataclass(frozen=True)
class Shards:
    """`read(i)` goes through the images of shard i, of `count`. images: how many there are in all, None where only reading tells.

    size: images a shard, None where the files decide. fingerprint: another one means that it is not the same data.
    """

    name: str
    count: int
    read: Callable[[int], Iterator[Item]]
    fingerprint: str
    size: int | None = None
    images: int | None = None


def open_shards(spec: str, split: str = "val", size: int = 1024) -> Shards:
    """Open the data that a string names: as for `open_source`, or any folder of images, or `wds:` with one pattern of shards.

    split: "val" is also whatever held-out split a Hugging Face data set has. Raises `DataError` if it is not there.
    """
    if size < 1:
        raise DataError(f"--part-size {size}: at least 1")
    kind, _, rest = spec.partition(":")
    if kind == "cifar10" and (not rest or any(Path(rest).rglob("*.parquet"))):
        kind, rest = "hf", rest or HUB_NAME
    if kind in ("hf", "hf-stream") and rest:
        if kind == "hf":
            return _of_hf(spec, rest, split, size)
        return _of_stream(spec, _split(spec, {"path": rest, "streaming": True}, split), _tables(rest), {})
    if kind == "wds" and rest:
        files = _tar_files(rest, split)
        return _of_stream(spec, tars.table(files), _facts(files), _short(files))
    if spec and Path(spec).is_dir():
        return _of_folder(Path(spec), split, size)
    source = open_source(spec)
    images: Any = source.split(split)
    if source.masks:
        photos = [photo for photo, _ in images.pairs]
        return _in_rows(
            spec, len(photos), size, lambda numbers: (Item(escaped(str(photos[i])), None, str(photos[i])) for i in numbers), photos
        )
    pixels, classes = images, source.classes
    if isinstance(table := getattr(images, "images", None), Listed):
        rows = images.indices
        return _in_rows(
            spec,
            len(rows),
            size,
            lambda numbers: (Item(str(i), classes[table.labels[rows[i]]], str(table.root / table.names[rows[i]])) for i in numbers),
            [table.names[row] for row in rows],
        )

    def items(numbers: range) -> Iterator[Item]:
        for i in numbers:
            image, label = pixels[i]
            yield Item(str(i), classes[label], image)

    return _in_rows(spec, len(pixels), size, items, classes)


def _in_rows(name: str, count: int, size: int, items: Callable[[range], Iterator[Item]], *facts: Any) -> Shards:
    """Divide images that have numbers."""
    if not count:
        raise DataError(f"{name}: holds no images")

    def read(shard: int) -> Iterator[Item]:
        return items(range(shard * size, min((shard + 1) * size, count)))

    return Shards(name, -(-count // size), read, _digest(count, *facts), size, count)


def _of_folder(root: Path, split: str, size: int) -> Shards:
    """All images below ROOT/SPLIT, in which a folder is a class; or below ROOT, without labels, if it has no splits."""
    called = VALIDATION if split == "val" else (split,)
    found = next((root / name for name in called if is_split(root / name)), None)
    if found is None and split != "val" and (root / split).is_dir():  # it is asked for by name, whatever it holds
        found = root / split
    if found is None and any(is_split(root / other) for other in ("train", *HELD_OUT)):
        raise DataError(f"{root}: has no split called {split}")
    below = found or root
    names = images_below(below)

    def items(numbers: range) -> Iterator[Item]:
        for name in (names[i] for i in numbers):
            folder, *rest = Path(name).parts
            yield Item(escaped(name), escaped(folder) if found and rest else None, str(below / name))

    return _in_rows(str(root), len(names), size, items, names)


def _of_hf(spec: str, name: str, split: str, size: int) -> Shards:
    """Keys are numbers of rows."""
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise DataError(f"{name}: no such folder")
    datasets.disable_progress_bars()
    table = _split(spec, {"path": name}, split)
    image, to_label = _columns(spec, table.features)
    table = table.cast_column(image, datasets.Image(decode=False))

    def items(numbers: range) -> Iterator[Item]:
        for i, row in zip(numbers, table.select(numbers), strict=True):
            yield Item(str(i), to_label(row), _encoded(row[image]))

    return _in_rows(spec, len(table), size, items, [table[i][image] for i in (0, len(table) - 1)] if len(table) else [])


def _of_stream(spec: str, table: Any, facts: Any, names: Mapping[str, str]) -> Shards:
    """Keys are SHARD.tar/KEY, of parquet SHARD/ROW. facts: what tells the data from others; names: of shards, by their paths."""
    try:
        features = table.features or table._resolve_features().features
    except Exception as error:  # of whatever protocol and file format is beneath
        raise DataError(f"{spec}: cannot be opened ({in_a_line(error)})") from None
    image, to_label = _columns(spec, features)
    table, count = table.cast_column(image, datasets.Image(decode=False)), table.num_shards

    def read(shard: int) -> Iterator[Item]:
        try:
            for i, row in enumerate(table.shard(count, shard)):
                tar = row.get(tars.SHARD, "")
                key = f"{escaped(names.get(tar, Path(tar).name))}/{_inside(row[tars.KEY])}" if tar else f"{shard}/{i}"
                yield Item(key, to_label(row), fetched(row[image]))
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # as above
            raise DataError(f"{spec}, shard {shard}: cannot be read on ({describe(error)})") from None

    return Shards(spec, count, read, _digest(count, *facts))


def _facts(files: Sequence[str]) -> tuple[list[str], list[int]]:
    return [Path(file).name for file in files], [Path(file).stat().st_size for file in files if "://" not in file]


def _short(files: Sequence[str]) -> dict[str, str]:
    """Return shards' names by their paths: what follows the folder that all lie in where file names alone are not unique."""
    names = [Path(file).name for file in files]
    if len(set(names)) < len(names):
        parts = [file.split("/") for file in files]
        alike = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
        names = ["/".join(part[alike:]) for part in parts]
    return dict(zip(files, names, strict=True))


def _tables(name: str) -> Any:
    """Return what tells a data set from others: its name on the hub; of a folder, its Parquet files and their sizes."""
    root = Path(name)
    if not root.is_dir():
        return [name]
    return sorted((str(path.relative_to(root)), path.stat().st_size) for path in root.rglob("*.parquet"))


def _split(spec: str, load: dict[str, Any], split: str) -> Any:
    try:
        splits = datasets.load_dataset(**load)
    except Exception as error:  # the library raises many types; each is a reason in words
        raise DataError(f"{spec}: cannot be opened ({in_a_line(error)})") from None
    names = (split, *HELD_OUT) if split == "val" else (split,)
    found = next((name for name in names if name in splits), None)
    if found is None:
        raise DataError(f"{spec}: has no split called {split}: --split {' or '.join(splits)}")
    return splits[found]


def _columns(spec: str, features: Any) -> tuple[str, Callable[[Any], str | int | None]]:
    """The column of images, and what a row's label is."""
    image, label, classes = find_columns(features)
    if image is None:
        raise DataError(f"{spec}: has no column of images; it has {', '.join(features)}")

    def to_label(row: Any) -> str | int | None:
        number = row[label] if label else None
        if number is None or number < 0:  # how the hub's data sets write that it is not told
            return None
        return printable(classes[number]) if classes and number < len(classes) else int(number)

    return image, to_label


def _inside(key: str) -> str:
    """A stranger's name of a member, printable, and without a way out of the folder that it may be put into."""
    parts = [part.replace(".", "\\x2e") if part in (".", "..") else part for part in escaped(key).split("/")]
    return "/".join(part for part in parts if part)


def _encoded(cell: Any) -> bytes | str:
    """Return an image's bytes or path; of one that is missing nothing, which is no image."""
    cell = cell or {"bytes": b"", "path": None}
    return cell["bytes"] if cell["bytes"] is not None else cell["path"] or b""


def _tar_files(spec: str, split: str) -> list[str]:
    root = Path(spec)
    if root.is_dir():
        found, every = (sorted(map(str, root.glob(pattern))) for pattern in (f"{split}*.tar", "*.tar"))
        if not found and any(Path(name).name.startswith(("train", *HELD_OUT)) for name in every):
            raise DataError(f"wds:{spec}: has no {split}*.tar")
        files = found or every
    elif ";" in spec:
        pattern = dict(zip(("train", "val"), spec.split(";"), strict=False)).get(split)
        if pattern is None:
            raise DataError(f"wds:{spec}: has no split called {split}")
        files = expanded(pattern)
    else:
        files = expanded(spec)
    if not files:
        raise DataError(f"wds:{spec}: holds no .tar")
    refuse_damaged(f"wds:{spec}", files)
    return files


def _digest(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
