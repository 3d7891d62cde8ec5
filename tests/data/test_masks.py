"""data/masks.py: miniatures of CamVid and Cityscapes in their layouts on the disk, and every way in which they can be wrong."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from roads import make_camvid, make_cityscapes

from repvgg.data import DataError, Source, masks, open_source
from repvgg.data.images import ImageError, decode, decode_mask, size_of
from repvgg.data.masks import CAMVID, open_camvid, open_cityscapes

REAL = Path(__file__).parents[3] / "shared/data/camvid"

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    return make_camvid(tmp_path / "camvid")


def test_camvid(camvid: Path) -> None:
    source = open_source(f"camvid:{camvid}")
    assert (len(source.train), len(source.val), len(source.split("test"))) == (8, 4, 3)
    assert (source.classes, source.masks, source.recipe) == (CAMVID, True, "camvid")
    assert source.preprocessing.input_size == (3, 48, 64)
    assert source.preprocessing.resize == 48
    image, mask = source.val[1]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((3, 48, 64), torch.uint8, (48, 64), torch.uint8)
    raw = np.asarray(Image.open(camvid / "valannot/val_001.png"))
    assert np.array_equal(mask.numpy(), np.where(raw == 11, 255, raw))
    assert len(source.limited(2).split("test")) == 2


def test_camvid_without_a_test_split(camvid: Path) -> None:
    for path in (camvid / "test").iterdir():
        path.unlink()
    (camvid / "test").rmdir()
    with pytest.raises(DataError, match="has no split called test"):
        open_camvid(camvid).split("test")


def test_cityscapes_against_torchvision(tmp_path: Path) -> None:
    """The same pairs, and its own table of ids."""
    from torchvision.datasets import Cityscapes

    root = make_cityscapes(tmp_path / "cityscapes")
    source = open_source(f"cityscapes:{root}")
    assert (len(source.train), len(source.val), source.test) == (4, 2, None)
    assert len(source.classes) == 19
    assert (source.classes[0], source.classes[13], source.classes[18]) == ("road", "car", "bicycle")
    assert source.recipe == "pspnet"
    for split, images in (("train", source.train), ("val", source.val)):
        theirs = Cityscapes(str(root), split, "fine", "semantic")
        found = {}
        for photo, ids in theirs:
            by_id = {c.id: c.train_id for c in Cityscapes.classes}
            wanted = np.vectorize(by_id.get)(np.asarray(ids, dtype=int))
            found[np.asarray(photo).tobytes()] = np.where((wanted < 0) | (wanted > 18), 255, wanted)
        assert len(found) == len(images)
        for i in range(len(images)):
            image, mask = images[i]
            assert np.array_equal(mask.numpy(), found[image.permute(1, 2, 0).contiguous().numpy().tobytes()])
            assert set(mask.unique().tolist()) == {0, 10, 13, 255}


def test_every_raw_id_of_cityscapes() -> None:
    source_ids = {}

    def spy(name: str, splits: object, ids: masks.Ids, recipe: str) -> Source:
        source_ids["ids"] = ids
        raise DataError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_source", spy)
        patch.setattr(masks, "_cityscapes_pairs", lambda root, split: [])
        with pytest.raises(DataError, match="enough"):
            open_cityscapes(Path("nowhere"))
    table = source_ids["ids"].train_id
    trained = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # the benchmark's 19, in order
    assert [int(i) for i in np.flatnonzero((table >= 0) & (table < 255))] == trained
    assert table[trained].tolist() == list(range(19))
    assert all(table[i] == 255 for i in range(34) if i not in trained)
    assert (table[34:] == -1).all()


def test_what_was_checked_is_not_checked_again_until_it_changes(camvid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    check = masks._verified

    def counted(pairs: Sequence[tuple[Path, Path]], ids: masks.Ids) -> dict[str, Any]:
        checks.append(len(pairs))
        return check(pairs, ids)

    monkeypatch.setattr(masks, "_verified", counted)
    for _ in range(2):
        open_camvid(camvid)
    assert checks == [15]
    os.utime(camvid / "trainannot/train_003.png", ns=(1, 1))
    open_camvid(camvid)
    assert checks == [15, 15]


# ------------------------------------------------------------------------------------------------------------ what is wrong


def write_mask(path: Path, ids: object) -> None:
    Image.fromarray(np.asarray(ids)).save(path)


def test_a_photo_without_its_mask(camvid: Path) -> None:
    (camvid / "valannot/val_002.png").unlink()
    with pytest.raises(DataError, match=r"val/val_002.png: has no mask, .*valannot/val_002.png is missing"):
        open_camvid(camvid)


def test_a_mask_without_its_photo(camvid: Path) -> None:
    (camvid / "train/train_002.png").unlink()
    with pytest.raises(DataError, match=r"trainannot/train_002.png: is a mask without a photo"):
        open_camvid(camvid)


def test_a_photo_of_cityscapes_without_its_mask(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    (root / "gtFine/train/bremen/bremen_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"bremen_000001_000019_leftImg8bit.png: has no mask"):
        open_cityscapes(root)


def test_sizes_that_differ(camvid: Path) -> None:
    write_mask(camvid / "trainannot/train_004.png", np.zeros((48, 60), np.uint8))
    with pytest.raises(ImageError, match=r"train_004.png: has 64 x 48 pixels, its mask .*trainannot/train_004.png 60 x 48"):
        open_camvid(camvid)


def test_ids_out_of_range(camvid: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[3, 5] = 12
    write_mask(camvid / "valannot/val_000.png", mask)
    with pytest.raises(ImageError, match=r"valannot/val_000.png: class id 12; ids are from 0 to 11"):
        open_camvid(camvid)


def test_a_mask_in_colours(camvid: Path) -> None:
    write_mask(camvid / "trainannot/train_000.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(ImageError, match=r"train_000.png: is a picture in RGB, a mask has one class id a pixel"):
        open_camvid(camvid)


@pytest.mark.parametrize("file", ["train/train_001.png", "trainannot/train_001.png"])
def test_damaged_files(camvid: Path, file: str) -> None:
    (camvid / file).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"train_001.png: not an image"):
        open_camvid(camvid)


def test_no_images_no_folder_no_labels(camvid: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train: no such folder"):
        open_camvid(tmp_path / "nowhere")
    for path in camvid.glob("trainannot/*"):
        write_mask(path, np.full((48, 64), 11, np.uint8))
    with pytest.raises(DataError, match="no pixel to train on has a label"):
        open_camvid(camvid)
    for folder in ("val", "valannot"):
        for path in (camvid / folder).iterdir():
            path.unlink()
    with pytest.raises(DataError, match="there are no images in val"):
        open_camvid(camvid)


def test_a_photo_too_long(camvid: Path) -> None:
    for folder, shape in (("train", (4, 200, 3)), ("trainannot", (4, 200))):
        write_mask(camvid / folder / "train_005.png", np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match=r"train_005.png: is more than 32 times as long as wide"):
        open_camvid(camvid)


# --------------------------------------------------------------------------------------------------------------- mask files


def test_masks_of_any_mode(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    grey = Image.fromarray(ids)
    palette = Image.fromarray(ids)
    palette.putpalette([5, 6, 7] * 256)
    wide = Image.fromarray(ids.astype(np.uint16))
    for name, image in (("grey", grey), ("palette", palette), ("wide", wide)):
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(decode_mask(tmp_path / f"{name}.png").numpy(), ids)
        assert size_of(tmp_path / f"{name}.png") == (3, 4)
    Image.fromarray(ids.astype(np.uint16) + 300).save(tmp_path / "many.png")
    with pytest.raises(ImageError, match="class id 311; ids are from 0 to 255"):
        decode_mask(tmp_path / "many.png")
    with pytest.raises(ImageError, match="no such file"):
        decode_mask(tmp_path / "none.png")


def test_a_turned_photo_has_the_size_that_a_viewer_shows(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert size_of(tmp_path / "turned.jpg") == (20, 10)
    Image.new("RGB", (20, 10)).save(tmp_path / "damaged.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert size_of(tmp_path / "damaged.png") == (10, 20) == tuple(decode(tmp_path / "damaged.png").shape[1:])


@pytest.mark.skipif(not REAL.is_dir(), reason="CamVid is not here")
def test_the_real_camvid() -> None:
    source = open_camvid(REAL)
    assert (len(source.train), len(source.val), len(source.split("test"))) == (367, 101, 233)
    assert source.preprocessing.input_size == (3, 360, 480)
