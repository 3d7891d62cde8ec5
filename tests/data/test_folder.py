"""data/folder.py: class folders, and what is said of those that cannot be used."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from repvgg import disk
from repvgg.data import DataError, open_source
from repvgg.data import folder as data_folder
from repvgg.data.images import ImageError, decode
from repvgg.data.shards import open_shards
from repvgg.disk import FileError
from repvgg.models.load import load
from repvgg.models.manifest import Preprocessing
from repvgg.models.zoo import manifest_of
from repvgg.predict.paths import expand
from repvgg.train.evaluate import evaluate_model
from repvgg.train.loop import train
from repvgg.train.recipes import Recipe


def make(root: Path, *paths: str, size: tuple[int, int] = (20, 14), format: str | None = None) -> Path:
    """A folder of images; each one's grey level is its number."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, number).save(root / path, format)
    return root


def test_a_class_folder(tmp_path: Path) -> None:
    paths = ("train/cat/a.png", "train/cat/deep/b.PNG", "train/dog/c.jpg", "val/cat/d.png", "val/dog/e.png", "val/dog/f.bmp")
    make(tmp_path, *paths)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/cat/._a.png").write_text("macOS left this")
    source = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog"]
    assert source.preprocessing == Preprocessing()
    assert source.recipe == "light"
    for split, expected in ((source.train, [(0, 0), (1, 0), (2, 1)]), (source.val, [(3, 0), (4, 1), (5, 1)])):
        assert [(int(split[i][0][0, 0, 0]), split[i][1]) for i in range(len(split))] == expected
    assert source.train[0][0].shape == (3, 14, 20)


def test_what_programs_leave_behind_is_no_image_and_no_class(tmp_path: Path) -> None:
    """A class may be called train, whatever lies in its folder."""
    left = ("train/.ipynb_checkpoints/1.png", "bus/@eaDir/2.png", "@eaDir/3.png", "bus/__MACOSX/4.png", "bus/5.cam.png")
    make(tmp_path, "train/a.png", "train/b.jfif", "bus/__c.png", "bus/deep/d.png", *left, format="PNG")
    source = open_source(str(tmp_path))
    assert source.classes == ["bus", "train"]
    assert source.rows is not None
    assert sorted(name for name, _, _ in source.rows()) == ["bus/__c.png", "bus/deep/d.png", "train/a.png", "train/b.jfif"]
    own = {"bus/__c.png", "bus/deep/d.png", "train/a.png", "train/b.jfif"}
    assert {str(Path(path).relative_to(tmp_path)) for path in expand([str(tmp_path)])} == own
    (tmp_path / "train").rename(tmp_path / "tram")
    assert {item.key.replace("tram", "train") for item in open_shards(str(tmp_path)).read(0)} == own


@pytest.mark.parametrize("names", [("Training", "Testing"), ("Train", "Valid", "Test"), ("seg_train", "seg_test")])
def test_splits_under_other_names_are_no_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}/{label}/1.png" for name in names for label in ("a", "b")), f"{names[0]}/c/1.png")
    with pytest.raises(DataError, match=rf"{names[0]}/.* look like splits: call them train/, val/ and test/$"):
        open_source(str(tmp_path))


def test_classes_may_have_the_same_sub_folders(tmp_path: Path) -> None:
    source = open_source(
        str(make(tmp_path, *(f"{label}/{when}/1.png" for label in ("tram", "trains") for when in ("day", "night"))))
    )
    assert source.classes == ["trains", "tram"]


def test_a_class_without_validation_images_keeps_its_number(tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png")))
    assert [source.val[i][1] for i in range(len(source.val))] == [2]


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")))
    (tmp_path / "train/b/2.png").write_bytes(b"damaged")
    with pytest.raises(ImageError, match=str(tmp_path / "train/b/2.png")):
        source.train[1]


@pytest.mark.parametrize(
    ("paths", "folders", "complaint"),
    [
        (["train/1.png", "val/a/1.png"], [], "train: holds no class folders"),
        (["train/a/1.png", "val/a/1.png"], ["train/empty"], "train: class 'empty' has no images (.avif, .bmp, "),
        (["train/a/1.png", "val/a/1.png", "val/b/1.png"], [], "val: class 'b' has no images to train on"),
        (["train/a/1.png"], ["val/a"], "val: holds no images (.avif, .bmp, "),
        (["train/a/1.png"], ["val"], "val: holds no class folders"),
        (["val/a/1.png"], ["train/a", "train/b"], "train: holds no images (.avif, .bmp, "),
    ],
)
def test_what_cannot_be_trained_on_is_said(paths: list[str], folders: list[str], complaint: str, tmp_path: Path) -> None:
    make(tmp_path, *paths)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/{complaint}")
    assert "\n" not in str(caught.value)


def test_a_folder_of_many_is_listed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_folder, "MANY", 3)
    root = make(tmp_path / "set", "train/a/1.png", "train/a/2.png", "train/b/deep/3.png", "val/a/4.png")
    listings: list[Path] = []
    listing = data_folder._listing

    def spy(root: Path) -> Any:
        listings.append(root)
        return listing(root)

    monkeypatch.setattr(data_folder, "_listing", spy)
    first = data_folder.Folder(root / "train")
    again = data_folder.Folder(root / "train")
    assert listings == [root / "train"]
    assert [first[i][1] for i in range(3)] == [again[i][1] for i in range(3)] == [0, 0, 1]
    assert list(first.names) == list(again.names)
    make(root, "train/b/deep/5.png")
    assert len(data_folder.Folder(root / "train")) == 4
    (root / "train/a/1.png").unlink()
    assert len(data_folder.Folder(root / "train")) == 3
    assert len(listings) == 3
    for path in (tmp_path / "cache/repvgg").iterdir():
        path.write_bytes(b"damaged")
    assert len(data_folder.Folder(root / "train")) == 3
    data_folder.Folder(root / "val")
    data_folder.Folder(root / "val")  # of few images nothing is kept
    assert len(listings) == 6


def test_the_division_is_the_same_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many images too, whose names are kept: what was trained on must not be evaluated on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_folder, "MANY", 3)
    root = make(tmp_path / "set", *(f"{label}/{number}.png" for label in "ab" for number in range(8)))
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    sources = [open_source(path) for path in (str(root), str(tmp_path / "link"), "set")]
    rows = [source.rows() for source in sources if source.rows]
    assert rows[0] == rows[1] == rows[2]
    assert [int(source.val[0][0][0, 0, 0]) for source in sources] == [int(sources[0].val[0][0][0, 0, 0])] * 3


@pytest.mark.parametrize("names", [("valid", "invalid"), ("test", "holiday"), ("bus", "train", "car")])
def test_classes_called_like_splits(names: tuple[str, ...], tmp_path: Path) -> None:
    """They hold no class folders, and lie beside no train/ that does."""
    make(tmp_path, *(f"{name}/{number}.png" for name in names for number in range(3)))
    assert open_source(str(tmp_path)).classes == sorted(names)
    keys = {item.key for item in open_shards(str(tmp_path)).read(0)}
    assert {key.split("/")[0] for key in keys} == set(names)
    assert len(keys) == 3 * len(names)


def test_names_that_are_not_utf8_are_shown_and_read(tmp_path: Path) -> None:
    """A Latin-1 folder trains, and its file says so in words that any terminal and any JSON can hold."""
    latin = os.fsdecode(b"caf\xe9")
    try:
        make(tmp_path, f"train/{latin}/1{latin}.png", "train/tea/2.png", f"val/{latin}/3.png", "val/tea/4\n.png")
    except OSError:
        pytest.skip("this file system knows UTF-8 alone")
    source = replace(open_source(str(tmp_path)), preprocessing=Preprocessing((3, 32, 32), 32))
    assert source.classes == ["caf\\xe9", "tea"]
    assert [int(source.train[i][0][0, 0, 0]) for i in range(2)] == [0, 1]
    recipe = Recipe(epochs=1, batch_size=2, crop="shift")
    run = train("repvgg_micro", source, recipe, tmp_path / "run", log=lambda line: None, width=0.25)
    model = load(tmp_path / "run/last.safetensors")
    assert manifest_of(model).classes == source.classes
    assert evaluate_model(model, source).images == run.last.images == 2
    (tmp_path / f"train/{latin}/1{latin}.png").write_bytes(b"damaged")
    with pytest.raises(ImageError, match=r"1caf\\udce9\.png: not an image"):
        source.train[0]
    items = [item for shard in [open_shards(str(tmp_path), "val")] for item in shard.read(0)]
    assert [(item.key, item.label) for item in items] == [("caf\\xe9/3.png", "caf\\xe9"), ("tea/4\\x0a.png", "tea")]
    assert all(decode(str(item.image)).shape == (3, 14, 20) for item in items)


def test_images_that_come_while_a_folder_is_listed_are_seen_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_folder, "MANY", 2)
    root = make(tmp_path / "set", "a/1.png", "a/2.png", "b/3.png")
    walked = disk.walked

    def copying(*where: Any, **how: Any) -> Any:
        for folder, files in walked(*where, **how):
            yield folder, files
            make(Path(folder), "late.png")
            os.utime(folder, ns=(1, 10**18))  # a clock that ticks

    monkeypatch.setattr(data_folder, "walked", copying)
    assert len(data_folder.Folder(root)) == 3
    monkeypatch.setattr(data_folder, "walked", walked)
    assert len(data_folder.Folder(root)) == 5


def test_links_back_and_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "set", "a/1.png", "b/2.png", "b/deep/3.png")
    (root / "a/all").symlink_to(root)
    assert list(data_folder.Folder(root).names) == ["a/1.png", "b/2.png", "b/deep/3.png"]
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(FileError, match=r"deep: cannot be read \(Permission denied\)"):
        data_folder.Folder(root)


def test_test_images_without_labels_are_no_split(tmp_path: Path) -> None:
    """As in a competition."""
    source = open_source(str(make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "test/4.png")))
    assert source.test is None


def test_photos_of_a_kind_that_is_not_read_are_not_left_out_in_silence(tmp_path: Path) -> None:
    root = make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    (root / "train/b/3.heic").write_bytes(b"\0\0\0\x18ftypheic")
    source = open_source(str(root))
    assert len(source.train) == 3
    with pytest.raises(ImageError, match=r"3.heic: not an image, or HEIC is not read here: convert it to JPEG"):
        source.train[2]


def test_a_validation_split_alone_can_be_evaluated_on(tmp_path: Path) -> None:
    """As of ImageNet, whose training images take twenty times the room."""
    make(tmp_path, "val/a/1.png", "val/a/2.png", "val/b/3.png", "val/b/4.png")
    with pytest.raises(DataError, match=r"has no train/: to evaluate on val/ alone, name that, with --split all"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path / "val")).split("all")) == 4
