"""data/cifar10.py: batches as the original archive spells them, against torchvision; and pickles that would run code."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg.data import DataError, open_source
from repvgg.data.cifar10 import CLASSES

PER_BATCH = 4
Array = np.ndarray[Any, Any]


def original(pixels: Array, labels: list[int]) -> bytes:
    """A batch as Python 2 and the NumPy of 2009 pickled it: protocol 2, byte strings, numpy.core.multiarray."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(integer(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def batches(count: int = PER_BATCH) -> dict[str, tuple[Array, list[int]]]:
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {n: (random.integers(0, 256, (count, 3072)).astype(np.uint8), random.integers(0, 10, count).tolist()) for n in names}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, (pixels, labels) in batches().items():
        (folder / name).write_bytes(original(pixels, labels))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}, 2))
    return tmp_path


def test_the_original_layout_against_torchvision(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # these are no copies of the originals
    for spec in (f"cifar10:{root}", f"cifar10:{root}/cifar-10-batches-py"):
        source = open_source(spec)
        assert source.classes == CLASSES == CIFAR10(root).classes
        for split, train in ((source.train, True), (source.val, False)):
            oracle = CIFAR10(root, train=train)
            assert len(split) == len(oracle)
            for index in range(len(split)):
                image, label = oracle[index]
                assert np.array_equal(split[index][0].permute(1, 2, 0).numpy(), np.asarray(image))
                assert split[index][1] == label


def test_batches_pickled_anew(root: Path) -> None:
    for name, (pixels, labels) in batches().items():
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, 2))
    source = open_source(f"cifar10:{root}")
    assert np.array_equal(source.train[5][0].numpy().ravel(), batches()["data_batch_2"][0][1])


class Hostile:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


def test_a_pickle_that_would_run_code_does_not(root: Path) -> None:
    proof = root / "executed"
    for call in ((os.system, f"touch {proof}"), (eval, f"open({str(proof)!r}, 'w')"), (Path.touch, proof)):
        (root / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({b"data": Hostile(*call), b"labels": []}, 2))
        with pytest.raises(DataError, match=r"data_batch_3: not a CIFAR-10 batch, or a damaged one .*it asks for") as caught:
            open_source(f"cifar10:{root}")
        assert "\n" not in str(caught.value)
    assert not proof.exists()


def test_numpy_is_not_asked_what_the_file_makes_of_it(root: Path) -> None:
    """It would take bytes for addresses, or read beyond a list that is too short."""
    path = root / "cifar-10-batches-py/data_batch_1"
    array = original(np.full((1, 24), 65, np.uint8), [])
    sizes, three, many = (b"J" + struct.pack("<i", n) + b"\x86" for n in (24, 3, 1_000_000))
    as_objects = array.replace(b"\x02\x00\x00\x00u1", b"\x02\x00\x00\x00O8").replace(sizes, three)
    kind = as_objects.index(b"R(J\x03")  # of which what follows tells more
    without = as_objects[: kind + 1] + as_objects[as_objects.index(b"b\x89") + 1 :]
    too_short = without.replace(b"T" + struct.pack("<i", 24) + b"A" * 24, b"]").replace(three, many)
    far_memo = b"\x80\x02}r\xff\xff\xff\xff."  # place 4,294,967,295, for which pickle's own machine makes room
    nested_key = b"\x80\x02})" + b"2\x86" * 60 + b"Ns."
    for content in (as_objects, too_short, far_memo, nested_key):
        path.write_bytes(content)
        with pytest.raises(DataError, match="data_batch_1: not a CIFAR-10 batch, or a damaged one"):
            open_source(f"cifar10:{root}")


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "label", "shape", "keys"])
def test_a_damaged_batch_is_named(damage: str, root: Path) -> None:
    path = root / "cifar-10-batches-py/test_batch"
    pixels, labels = batches()["test_batch"]
    content = {
        "missing": b"",
        "empty": b"",
        "truncated": path.read_bytes()[:-3000],
        "label": original(pixels, [0, 1, 2, 10]),
        "shape": original(pixels[:, :1000], labels),
        "keys": pickle.dumps({b"images": 1}, 2),
    }
    path.write_bytes(content[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(DataError, match="test_batch: not a CIFAR-10 batch, or a damaged one"):
        open_source(f"cifar10:{root}")


def test_a_folder_with_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither parquet shards nor cifar-10-batches-py"):
        open_source(f"cifar10:{tmp_path}")
