"""data/shards.py: every source gives each image once, by its key, with its label if it has one."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from roads import make_camvid

from repvgg.data import DataError, open_source
from repvgg.data.images import decode
from repvgg.data.shards import Item, Shards, open_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "hf"))


def png(grey: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), grey, dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def grey(item: Item) -> int:
    return int((item.image if isinstance(item.image, torch.Tensor) else decode(item.image))[0, 0, 0])


def every(shards: Shards) -> list[Item]:
    return [item for shard in range(shards.count) for item in shards.read(shard)]


def tar(path: Path, greys: list[int], labels: bool = True) -> None:
    with tarfile.open(path, "w") as file:
        for number in greys:
            for suffix, data in (("png", png(number)), *((("cls", str(number % 3).encode()),) if labels else ())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def parquet(folder: Path, split: str, greys: list[int], label: datasets.ClassLabel | None = None) -> None:
    columns: dict[str, Any] = {"image": [{"bytes": png(i), "path": None} for i in greys]}
    features = {"image": datasets.Image()}
    if label:
        columns["label"], features["label"] = [i % 3 if i else -1 for i in greys], label
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(folder / f"{split}-00000.parquet"))


def test_a_folder_with_splits_and_classes(tmp_path: Path) -> None:
    for name, level in (
        ("train/cat/0.png", 0),
        ("val/dog/b.png", 2),
        ("val/cat/a.png", 1),
        ("val/cat/deep/c.PNG", 3),
        ("val/d.png", 4),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(level))
    (tmp_path / "val/cat/._a.png").write_bytes(b"macOS left this")
    shards = open_shards(str(tmp_path), size=3)
    assert (shards.count, shards.images, shards.size) == (2, 4, 3)
    wanted = [("cat/a.png", "cat", 1), ("cat/deep/c.PNG", "cat", 3), ("d.png", None, 4), ("dog/b.png", "dog", 2)]
    assert [(item.key, item.label, grey(item)) for item in every(shards)] == wanted
    assert [item.key for item in every(open_shards(str(tmp_path), "train"))] == ["cat/0.png"]
    with pytest.raises(DataError, match="has no split called test"):
        open_shards(str(tmp_path), "test")
    (tmp_path / "val").rename(tmp_path / "valid")
    assert [(item.key, item.label, grey(item)) for item in every(open_shards(str(tmp_path)))] == wanted


def test_a_folder_of_images_and_what_tells_it_from_others(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.png")):
        (photos / name).write_bytes(png(i))
    shards = open_shards(str(photos))
    assert [(item.key, item.label, grey(item)) for item in every(shards)] == [("a.png", None, 0), ("deep/b.png", None, 1)]
    photos.rename(tmp_path / "moved")
    assert open_shards(str(tmp_path / "moved")).fingerprint == shards.fingerprint
    (tmp_path / "moved/c.png").write_bytes(png(3))
    assert open_shards(str(tmp_path / "moved")).fingerprint != shards.fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no images"):
        open_shards(str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_parquet(kind: str, tmp_path: Path) -> None:
    parquet(tmp_path / "set", "train", [1, 2])
    parquet(tmp_path / "set", "test", [3, 4, 5, 6, 7])
    shards = open_shards(f"{kind}:{tmp_path / 'set'}", size=2)  # the held-out split, without labels
    items = every(shards)
    assert [grey(item) for item in items] == [3, 4, 5, 6, 7]
    assert {item.label for item in items} == {None}
    assert [item.key for item in items] == (["0", "1", "2", "3", "4"] if kind == "hf" else ["0/0", "0/1", "0/2", "0/3", "0/4"])
    assert (shards.count, shards.images, shards.size) == ((3, 5, 2) if kind == "hf" else (1, None, None))
    assert [grey(item) for item in every(open_shards(f"{kind}:{tmp_path / 'set'}", "train"))] == [1, 2]
    with pytest.raises(DataError, match="has no split called dev: --split"):
        open_shards(f"{kind}:{tmp_path / 'set'}", "dev")


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_labels_by_name_and_the_hub_s_minus_one(kind: str, tmp_path: Path) -> None:
    parquet(tmp_path / "set", "train", [0, 1, 2, 3], datasets.ClassLabel(names=["cat", "dog", "owl"]))
    items = every(open_shards(f"{kind}:{tmp_path / 'set'}", "train"))
    assert [item.label for item in items] == [None, "dog", "owl", "cat"]


def test_a_shard_of_webdataset_is_a_file(tmp_path: Path) -> None:
    for name, greys in (("train-0", [90]), ("val-0", [0, 1, 2]), ("val-1", [3])):
        tar(tmp_path / f"{name}.tar", greys)
    (folder, names, pattern) = specs = [
        f"wds:{tmp_path}",
        f"wds:{tmp_path}/train-0.tar;{tmp_path}/val-{{0..1}}.tar",
        f"wds:{tmp_path}/val-{{0..1}}.tar",
    ]
    for spec in specs:
        shards = open_shards(spec)
        assert shards.count == 2
        assert [[item.key for item in shards.read(i)] for i in (0, 1)] == [
            ["val-0.tar/000", "val-0.tar/001", "val-0.tar/002"],
            ["val-1.tar/003"],
        ]
        assert [(item.label, grey(item)) for item in every(shards)] == [(0, 0), (1, 1), (2, 2), (0, 3)]
    assert open_shards(folder).fingerprint == open_shards(names).fingerprint == open_shards(pattern).fingerprint
    assert len(every(open_shards(folder, "train"))) == 1
    for spec, split in ((folder, "test"), (names, "test")):
        with pytest.raises(DataError, match="has no"):
            open_shards(spec, split)


def test_webdataset_without_labels_or_splits(tmp_path: Path) -> None:
    for name, greys in (("a", [1, 2]), ("b", [3])):
        tar(tmp_path / f"{name}.tar", greys, labels=False)
    items = every(open_shards(f"wds:{tmp_path}"))
    assert [(item.key, item.label) for item in items] == [("a.tar/001", None), ("a.tar/002", None), ("b.tar/003", None)]


def test_another_stream_is_other_data(tmp_path: Path) -> None:
    for name, greys in (("one", [1, 2]), ("two", [1, 2, 3])):
        parquet(tmp_path / name, "train", greys)
    one, two = (open_shards(f"hf-stream:{tmp_path / name}", "train") for name in ("one", "two"))
    assert one.count == two.count
    assert one.fingerprint != two.fingerprint
    (tmp_path / "one").rename(tmp_path / "moved")
    assert open_shards(f"hf-stream:{tmp_path / 'moved'}", "train").fingerprint == one.fingerprint


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for folder in "01":
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "shard.tar", [1, 2])
    items = every(open_shards(f"wds:{tmp_path}/{{0..1}}/shard.tar"))
    assert [item.key for item in items] == ["0/shard.tar/001", "0/shard.tar/002", "1/shard.tar/001", "1/shard.tar/002"]


def test_sources_to_train_on(tmp_path: Path) -> None:
    digits = open_shards("digits", size=100)
    assert (digits.count, digits.images) == (4, 360)
    source = open_source("digits")
    for i, item in enumerate(every(digits)):
        image, label = source.val[i]
        assert torch.equal(image, torch.as_tensor(item.image))
        assert (item.key, item.label) == (str(i), str(label))
    photos = every(open_shards(f"camvid:{make_camvid(tmp_path / 'camvid')}"))
    assert [Path(item.key).name for item in photos] == [f"val_{i:03d}.png" for i in range(4)]
    assert all(item.image == item.key and item.label is None for item in photos)


def test_an_image_that_is_missing_is_no_image(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"image": [None, {"bytes": png(7), "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    table.to_parquet(str(tmp_path / "train-00000.parquet"))
    assert [item.image for item in every(open_shards(f"hf:{tmp_path}", "train"))] == [b"", png(7)]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    tar(tmp_path / "val-0.tar", [1, 2, 3])
    (tmp_path / "none").mkdir()
    table = datasets.Dataset.from_dict({"text": ["a"]})
    table.to_parquet(str(tmp_path / "none/val-00000.parquet"))
    for spec, complaint in (
        ("nowhere", "no data 'nowhere'"),
        ("hf:./nowhere", "no such folder"),
        (f"hf:{tmp_path}/none", "has no column of images; it has text"),
        (f"hf-stream:{tmp_path}/nowhere", "cannot be opened"),
        (f"wds:{tmp_path}/none", r"holds no \.tar"),
        (f"wds:{tmp_path}/val-{{0..4}}.tar", "there is no .*val-1.tar"),
        ("wds:http://127.0.0.1:9/val.tar", "shard 0: cannot be read on"),
    ):
        with pytest.raises(DataError, match=complaint) as caught:
            every(open_shards(spec))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="--part-size 0: at least 1"):
        open_shards("digits", size=0)
    whole = (tmp_path / "val-0.tar").read_bytes()
    for length in (0, 1500, 3000):
        (tmp_path / "val-1.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"val-1\.tar is damaged"):
            open_shards(f"wds:{tmp_path}")
    longer = tarfile.TarInfo("004.png")
    longer.size = 100_000
    (tmp_path / "val-1.tar").write_bytes(whole[:2048] + longer.tobuf() + bytes(1024))
    shards = open_shards(f"wds:{tmp_path}")
    assert len(list(shards.read(0))) == 3  # a damaged one hinders no other
    with pytest.raises(DataError, match=r"shard 1: cannot be read on"):
        list(shards.read(1))


def test_keys_do_not_lead_out_of_a_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as file:
        for number, name in enumerate(("../../etc/passwd", "/tmp/x", "a/./b\x1b", "a/..c/d")):
            data = png(number)
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    keys = [item.key for item in every(open_shards(f"wds:{tmp_path}"))]
    assert keys == [r"val.tar/\x2e\x2e/\x2e\x2e/etc/passwd", "val.tar/tmp/x", r"val.tar/a/\x2e/b\x1b", "val.tar/a/..c/d"]
