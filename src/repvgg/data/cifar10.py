"""CIFAR-10 (Krizhevsky 2009): from the hub, from parquet shards, or as torchvision lays it out on disk.

The original files are pickles. They are read by an unpickler that knows NumPy arrays and nothing else, so none is ever executed.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repvgg.data import DataError, Decoded, Source
from repvgg.data.hf import CIFAR10, open_hf

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
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"], dtype=np.uint8), [int(x) for x in batch[b"labels"]]
        if not set(labels) <= set(range(10)):
            raise ValueError("a label is not from 0 to 9")
        return torch.from_numpy(pixels.reshape(len(labels), 3, 32, 32)), labels
    except Exception as error:  # a hostile pickle raises anything
        raise DataError(f"{path}: not a CIFAR-10 batch, or a damaged one ({error})") from None


class _ArraysOnly(pickle.Unpickler):
    RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}  # of NumPy 1 and 2
    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), *RECONSTRUCT}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "_reconstruct":
            return np.array(0).__reduce__()[0]  # its present home
        return super().find_class(module, name)
