"""data/hf.py: small parquet data sets made here, and the real CIFAR-10 where it lies."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg.data import DataError, InMemory, open_source
from repvgg.data.hf import CIFAR10, Encoded
from repvgg.data.images import ImageError
from repvgg.models.manifest import Preprocessing

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "dog", "owl"]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "hf"))


def picture(number: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def make(root: Path, splits: dict[str, dict[str, list[Any]]], label: Any = None, image: str = "image") -> str:
    """A folder of parquet files, one a split."""
    for split, columns in splits.items():
        features = {name: datasets.Image() if name == image else label or datasets.ClassLabel(names=NAMES) for name in columns}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    return f"hf:{root}"


def columns(labels: list[Any], size: tuple[int, int] = (20, 20)) -> dict[str, list[Any]]:
    return {"image": [picture(i, size) for i in range(len(labels))], "label": labels}


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_a_folder_of_parquet(held_out: str, tmp_path: Path) -> None:
    spec = make(tmp_path, {"train": columns([2, 0, 1, 1]), held_out: columns([1, 2])})
    source = open_source(spec)
    assert source.name == spec
    assert source.classes == NAMES
    assert [source.train[i][1] for i in range(len(source.train))] == [2, 0, 1, 1]
    assert [source.val[i][1] for i in range(len(source.val))] == [1, 2]
    for i in range(4):
        assert np.array_equal(source.train[i][0].permute(1, 2, 0).numpy(), np.asarray(picture(i)))


@pytest.mark.parametrize(("labels", "whole"), [([1, 2, 0], True), ([1, None, 0], False), ([-1, -1], False)])
def test_a_test_split_beside_the_validation_split(labels: list[Any], whole: bool, tmp_path: Path) -> None:
    spec = make(tmp_path, {"train": columns([2, 0, 1, 1]), "validation": columns([1]), "test": columns(labels)})
    source = open_source(spec)
    assert len(source.val) == 1
    if whole:
        assert [source.split("test")[i][1] for i in range(3)] == labels
    else:
        with pytest.raises(DataError, match="has no split called test"):
            source.split("test")


def test_small_images_are_kept_in_memory_and_large_ones_are_not(tmp_path: Path) -> None:
    small = open_source(make(tmp_path, {"train": columns([0, 1]), "test": columns([0])}))
    assert isinstance(small.train, InMemory)
    assert small.preprocessing == Preprocessing((3, 20, 20), 20)
    assert small.recipe == "cifar"
    (tmp_path / "large").mkdir()
    large = open_source(make(tmp_path / "large", {"train": columns([0, 1], (80, 60)), "test": columns([0], (80, 60))}))
    assert isinstance(large.train, Encoded)
    assert large.preprocessing == Preprocessing()
    assert large.recipe == "light"
    assert large.train[1][0].shape == (3, 60, 80)
    assert large.train[1][0] is not large.train[1][0]


def test_images_of_many_sizes(tmp_path: Path) -> None:
    many: dict[str, list[Any]] = {
        "image": [picture(0), picture(1, (30, 20)), picture(2, (9, 40)), picture(3), picture(4)],
        "label": [0, 1, 2, 0, 1],
    }
    source = open_source(make(tmp_path, {"train": many, "test": columns([0])}))  # first, middle and last: not of one size
    assert isinstance(source.train, Encoded)
    assert [tuple(source.train[i][0].shape[1:]) for i in range(3)] == [(20, 20), (20, 30), (40, 9)]


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_the_number_of_classes_without_names(kind: str, tmp_path: Path) -> None:
    label = datasets.Value(kind)
    source = open_source(make(tmp_path, {"train": columns([4, 0, 1]), "validation": columns([4])}, label))
    assert source.classes == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("splits", "label", "complaint"),
    [
        ({"test": [0]}, None, "has no split called train (it has test)"),
        ({"train": [0, 1]}, None, "has no val, valid, validation, test split to evaluate on"),
        ({"train": [0, 1, 2], "test": [-1]}, datasets.Value("int64"), "label -1 in test, but there are 3 classes"),
        ({"train": [0, 1], "test": [2]}, datasets.Value("int64"), "label 2 in test, but there are 2 classes"),
        (
            {"train": [7, 2**62, 7], "test": [7]},
            datasets.Value("int64"),
            f"column 'label' holds 2 distinct integers from 7 to {2**62}, which are ids",
        ),
        ({"train": [-5, 1], "test": [1]}, datasets.Value("int32"), "label -5 in train, but there are 2 classes"),
        ({"train": [0, 1], "test": [2]}, None, "class 'owl' has no images to train on"),
        ({"train": ["a"], "test": ["a"]}, datasets.Value("string"), "label, labels, class, target or cls); it has image (PIL"),
        ({"train": [0, None], "test": [0]}, None, "holds images without a label"),
        ({"train": [0.5], "test": [1]}, datasets.Value("float32"), "one of labels (ClassLabel, or integers called"),
    ],
)
def test_what_cannot_be_trained_on_is_said(splits: dict[str, list[Any]], label: Any, complaint: str, tmp_path: Path) -> None:
    spec = make(tmp_path, {name: columns(labels) for name, labels in splits.items()}, label)
    with pytest.raises(DataError) as caught:
        open_source(spec)
    assert str(caught.value).startswith(spec)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_image_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a column of images"):
        open_source(make(tmp_path, {"train": {"label": [0, 1]}, "test": {"label": [0]}}))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "../no/where", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(f"hf:{name}")


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened") as caught:
        open_source(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_numbered(tmp_path: Path) -> None:
    good = io.BytesIO()
    picture(0).save(good, "PNG")
    cells = [
        {"bytes": good.getvalue(), "path": None},
        {"bytes": b"damaged", "path": "x.png"},
        {"bytes": good.getvalue(), "path": None},
        None,
        {"bytes": good.getvalue(), "path": None},
    ]
    source = open_source(make(tmp_path, {"train": {"image": cells, "label": [0, 1, 2, 1, 2]}, "test": columns([0])}))
    assert source.train[2][1] == 2
    with pytest.raises(ImageError, match=r"^x\.png: not an image"):
        source.train[1]
    with pytest.raises(ImageError, match=r"^image 3: not an image"):
        source.train[3]
    cells[0], cells[-1] = cells[3], cells[1]  # those by which the shape is found
    source = open_source(make(tmp_path / "other", {"train": {"image": cells, "label": [0, 1, 2, 1, 2]}, "test": columns([0])}))
    assert isinstance(source.train, InMemory)
    assert source.train[2][1] == 2
    with pytest.raises(ImageError, match=r"^image 0: not an image"):
        source.train[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/cifar10")
@pytest.mark.parametrize("kind", ["hf", "cifar10"])
def test_the_real_cifar10(kind: str) -> None:
    import pyarrow.parquet  # type: ignore[import-untyped]

    source = open_source(f"{kind}:{SHARED}")
    assert source.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert source.preprocessing == CIFAR10
    assert source.recipe == "cifar"
    for split, name, count in ((source.train, "train", 5000), (source.val, "test", 1000)):
        assert isinstance(split, InMemory)
        assert Counter(split.labels) == dict.fromkeys(range(10), count)
        rows = [row for file in sorted(SHARED.glob(f"{name}-*")) for row in pyarrow.parquet.read_table(file).column("img")]
        for index in (0, 777, 10 * count - 1):
            pixels = np.array(Image.open(io.BytesIO(rows[index]["bytes"].as_py())).convert("RGB"))
            assert torch.equal(split[index][0], torch.from_numpy(pixels).permute(2, 0, 1))
