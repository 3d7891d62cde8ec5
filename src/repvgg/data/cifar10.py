"""CIFAR-10 (Krizhevsky 2009): from the hub, from parquet shards, or as torchvision lays it out on disk.

The original files are pickles. They are read without executing anything, as checkpoints are (models/pickles.py).
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repvgg.data import DataError, Decoded, Source
from repvgg.data.hf import CIFAR10, open_hf
from repvgg.models.pickles import BLANK, Machine

HUB_NAME = "uoft-cs/cifar10"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def open_cifar10(root: str = "") -> Source:
    """`root`: a folder of parquet shards, or one that holds cifar-10-batches-py; empty: the hub."""
    if not root:
        return open_hf(HUB_NAME)
    folder = Path(root)
    batches = folder if folder.name == "cifar-10-batches-py" else folder / "cifar-10-batches-py"
    if not batches.is_dir():
        if any(folder.rglob("*.parquet")):
            return open_hf(root)
        raise DataError(f"{root}: holds neither parquet shards nor cifar-10-batches-py")
    train = _batches([batches / f"data_batch_{i}" for i in range(1, 6)])
    return Source(f"cifar10:{root}", train, _batches([batches / "test_batch"]), CLASSES, CIFAR10, "cifar")


def _batches(paths: list[Path]) -> Decoded:
    read = [_read(path) for path in paths]
    return Decoded(torch.cat([pixels for pixels, _ in read]), [x for _, labels in read for x in labels])


def _read(path: Path) -> tuple[Tensor, list[int]]:
    try:
        batch = _Arrays(lambda _: BLANK).run(io.BytesIO(path.read_bytes()))  # type: ignore[arg-type, return-value]
        found = {name.decode() if isinstance(name, bytes) else name: value for name, value in batch.items()}
        pixels, labels = found["data"].array(), [int(x) for x in found["labels"]]
        if not set(labels) <= set(range(10)):
            raise ValueError("a label is not from 0 to 9")
        return torch.from_numpy(pixels.reshape(len(labels), 3, 32, 32)), labels
    except Exception as error:  # a hostile pickle raises anything
        raise DataError(f"{path}: not a CIFAR-10 batch, or a damaged one ({error})") from None


class _Arrays(Machine):
    """Keeps what NumPy has pickled of an array."""

    def step(self, name: str, argument: Any) -> None:
        if name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(_called(function.name, arguments))
        elif name == "BUILD":
            state = self.stack.pop()
            self.stack[-1].state = state
        else:
            super().step(name, argument)


@dataclass
class _Array:
    """Stands for an array, or for the kind of its numbers, by what it was made of."""

    arguments: Any
    state: Any = None

    def array(self) -> Any:
        """Return the array. Raises ValueError for other numbers than bytes."""
        _, shape, kind, in_columns, data = self.state
        data = data.encode("latin1") if isinstance(data, str) else data
        if kind.arguments[0] not in ("u1", b"u1") or in_columns or not isinstance(data, bytes):
            raise ValueError("its pixels are no bytes")
        return np.frombuffer(bytearray(data), np.uint8).reshape(shape)


def _called(name: str, arguments: Any) -> Any:
    if name == "_codecs.encode":
        return arguments[0]  # as which Python 3 spells bytes for Python 2
    if name not in ("numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
        raise ValueError(f"it asks for {name}")
    return _Array(arguments)
