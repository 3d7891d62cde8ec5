"""views.py and masks.py: windows, scales and mirrors by hand; masks and overlays as files; what cannot be read."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import centred, randomize, relative_error, varied
from PIL import Image
from roads import COLOURS, make_camvid, road
from torch import Tensor, nn

from repvgg.api.using import predictions
from repvgg.data.images import ImageError, decode, decode_mask
from repvgg.data.masks import CAMVID
from repvgg.data.transforms import normalise
from repvgg.disk import FileError
from repvgg.models import zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.views import Views, likeliest, seen, segment, starts
from repvgg.predict.masks import MaskPrediction, colours, predict_masks, write_masks
from repvgg.predict.paths import expand

X = torch.randn(1, 3, 20, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def lopsided(x: Tensor) -> Tensor:
    """A network that sees where its left border is: mirrors and windows change what it says."""
    ramp = torch.linspace(0, 1, x.shape[3], dtype=x.dtype)
    return torch.stack([x[:, 0], x[:, 1] * ramp, x[:, 2] + ramp], 1)


@pytest.mark.parametrize(("length", "window"), [(7, 7), (8, 7), (20, 7), (713, 713), (2048, 713), (1024, 713), (100, 1)])
def test_windows_cover_all_and_overlap_by_a_third(length: int, window: int) -> None:
    found = starts(length, window)
    assert found[0] == 0
    assert found[-1] == length - window
    assert all(0 < b - a <= max(1, round(window * 2 / 3 + 0.5)) for a, b in pairwise(found))
    assert set().union(*(range(a, a + window) for a in found)) == set(range(length))


def test_one_view_is_the_network_itself() -> None:
    assert torch.equal(segment(lopsided, X, (20, 31), (9, 9)), lopsided(X))
    larger = segment(lopsided, X, (40, 62), (9, 9))
    assert torch.equal(larger, F.interpolate(lopsided(X), (40, 62), mode="bilinear"))


def test_windows_by_hand() -> None:
    total, count = torch.zeros(1, 3, 20, 31, dtype=torch.float64), torch.zeros(20, 31, dtype=torch.float64)
    for top in (0, 6, 11):
        for left in (0, 6, 12, 18, 22):
            total[..., top : top + 9, left : left + 9] += lopsided(X[..., top : top + 9, left : left + 9]).softmax(1)
            count[top : top + 9, left : left + 9] += 1
    got = segment(lopsided, X, (20, 31), (9, 9), Views(slide=True))
    assert relative_error(got.exp(), total / count) < 1e-12
    whole = segment(lopsided, X, (20, 31), (99, 99), Views(slide=True))  # an image smaller than the window is one window
    assert relative_error(whole.exp(), lopsided(X).softmax(1)) < 1e-12


def test_scales_and_mirrors_by_hand() -> None:
    views = []
    for size in ((10, 16), (30, 46)):
        x = F.interpolate(X, size, mode="bilinear")
        for found in (lopsided(x).softmax(1), lopsided(x.flip(3)).softmax(1).flip(3)):
            views.append(F.interpolate(found, (20, 31), mode="bilinear"))
    got = segment(lopsided, X, (20, 31), (9, 9), Views(scales=(0.5, 1.5), flip=True))
    assert relative_error(got.exp(), torch.stack(views).mean(0)) < 1e-12
    assert torch.allclose(got.exp().sum(1), torch.ones(1, 20, 31, dtype=torch.float64))


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (9.0,), (float("nan"),)])
def test_scales_that_make_no_sense(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales are above 0 and at most 8"):
        Views(scales=scales)


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def model() -> nn.Module:
    net = zoo.create_model("pspnet_repvgg_micro", num_classes=11, width=0.125)
    p = Preprocessing((3, 48, 64), 48)
    zoo.remember(net, Manifest(zoo.manifest_of(net).arch, classes=CAMVID, preprocessing=p))
    photos = torch.stack([torch.from_numpy(road(i, (48, 64))[0]).permute(2, 0, 1) for i in range(4)])
    return centred(randomize(net, (4, 3, 48, 64)), normalise(photos, p))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_camvid(tmp_path / "camvid", 2, 2, 2) / "test"


def test_masks_against_the_model_itself(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    photo, _ = road(5, (70, 50))  # of another size than the model was trained with
    Image.fromarray(photo).save(photos / "tall.png")
    answers = list(predict_masks(model, [str(photos)]))
    assert [Path(a.path).name for a in answers] == ["tall.png", "test_000.png", "test_001.png"]
    p = zoo.manifest_of(model).preprocessing
    for answer in answers:
        image = decode(answer.path)
        height, width = image.shape[1:]
        short = 48 / min(height, width)
        small = torch.nn.functional.interpolate(
            image[None].float(), (int(height * short), int(width * short)), mode="bilinear", antialias=True
        )
        with torch.no_grad():
            scores = model(normalise(small.round().to(torch.uint8) if min(height, width) != 48 else image[None], p))
        wanted = F.interpolate(scores, (height, width), mode="bilinear")[0].argmax(0)
        assert varied(wanted.flatten().bincount())
        assert answer.mask is not None
        assert answer.mask.shape == (height, width)
        assert (answer.mask == wanted).float().mean() > 0.97  # all but edges: the photo is rounded otherwise
        assert answer.shares is not None
        assert sum(answer.shares.values()) == pytest.approx(1)
        assert list(answer.shares.values()) == sorted(answer.shares.values(), reverse=True)
        for name, share in answer.shares.items():
            assert share == (answer.mask == CAMVID.index(name)).double().mean().item()


def written(model: nn.Module, photos: Path, out: Path) -> Iterator[MaskPrediction]:
    return write_masks(predict_masks(model, [str(photos)]), expand([str(photos)]), out, CAMVID)


def test_files_that_are_written(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "masks"
    answers = list(written(model, photos, out))
    stems = ["test_000", "test_001"]
    files = {f"{stem}{end}" for stem in stems for end in (".png", "_overlay.jpg")} | {"masks.json"}
    assert {path.name for path in out.iterdir()} == files
    listed = json.loads((out / "masks.json").read_text())
    assert listed["classes"] == CAMVID
    palette = colours(CAMVID)
    for answer, entry in zip(answers, listed["images"], strict=True):
        assert answer.mask is not None
        assert answer.image is not None
        assert (entry["path"], entry["shares"]) == (answer.path, answer.shares)
        assert torch.equal(decode_mask(out / entry["mask"]), answer.mask)
        shown = np.asarray(Image.open(out / entry["mask"]).convert("RGB"))
        assert np.array_equal(shown, palette[answer.mask.numpy()])
        blended = np.asarray(Image.open(out / entry["overlay"])).astype(float)
        wanted = (answer.image.permute(1, 2, 0).numpy().astype(float) + palette[answer.mask.numpy()]) / 2
        assert np.abs(blended - wanted).mean() < 12  # JPEG, of noise


def test_two_images_of_one_name_are_refused(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    (photos / "deep").mkdir()
    (photos / "deep/test_000.png").write_bytes((photos / "test_000.png").read_bytes())
    with pytest.raises(ValueError, match=r"test_000.png: .*test_000.png has the same name: give each folder an --out of its own"):
        next(written(model, photos, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", "deep", "deep/../../test"])
def test_masks_never_overwrite_the_photos(model: nn.Module, photos: Path, out: str) -> None:
    (photos / "deep").mkdir()
    (photos / "deep/other.png").write_bytes((photos / "test_000.png").read_bytes())
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    with pytest.raises(ValueError, match="the images lie there, and masks would overwrite them: name another folder"):
        next(written(model, photos, photos / out))
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before


def test_the_same_command_again_takes_no_mask_for_a_photo(model: nn.Module, photos: Path) -> None:
    """Wherever it writes to, be it below the photos."""
    out = photos / "masks"

    def shares() -> list[Any]:
        answers: Any = predictions(model, str(photos), out=out)
        return [(answer.path, answer.shares) for answer in answers]

    first = shares()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert shares() == first
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [answer.path for answer in predictions(model, str(photos), out=photos / "more")] == [path for path, _ in first]
    (out / "mine.png").write_bytes((photos / "test_000.png").read_bytes())  # a photo, among masks
    with pytest.raises(ValueError, match="the images lie there"):
        list(predictions(model, str(photos), out=out))


def test_what_cannot_be_read_is_said_and_the_others_go_on(model: nn.Module, photos: Path) -> None:
    (photos / "a.png").write_bytes(b"damaged")
    Image.new("RGB", (2000, 3)).save(photos / "b.png")
    answers = list(predict_masks(model, [str(photos)]))
    assert [a.error is None for a in answers] == [False, False, True, True]
    assert str(answers[0].error).startswith(f"{photos}/a.png: not an image")
    assert answers[1].error == f"{photos}/b.png: is more than 32 times as long as wide"
    with pytest.raises(ImageError, match="no such file"):
        list(predict_masks(model, [str(photos / "none.png")]))
    with pytest.raises(ValueError, match="no images"):
        list(predict_masks(model, []))


def test_a_classifier_gives_no_masks(photos: Path) -> None:
    classifier = zoo.create_model("repvgg_micro", num_classes=3, width=0.125).eval()
    with pytest.raises(ValueError, match="this model gives labels, not masks"):
        next(predict_masks(classifier, [str(photos)]))


def test_colours_are_told_apart() -> None:
    for names in (CAMVID, [f"class {i}" for i in range(40)]):
        palette: Any = colours(names)
        assert palette.dtype == np.uint8
        assert len({tuple(row) for row in palette.tolist()}) == len(names)
    assert colours(["road"])[0].tolist() == [128, 64, 128]
    assert len(COLOURS) == 4


def test_masks_of_somebody_else_are_not_overwritten(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    out.mkdir()
    (out / "test_001.png").write_bytes(b"drawn by hand")
    with pytest.raises(FileError, match=r"test_001.png: was not made by repvgg predict, and would be overwritten"):
        list(written(model, photos, out))
    assert [path.name for path in out.iterdir()] == ["test_001.png"]


def test_masks_of_other_photos_join_those_that_are_there(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    for name in ("test_000.png", "test_001.png"):
        list(written(model, photos / name, out))
    listed = json.loads((out / "masks.json").read_text())["images"]
    assert [(entry["mask"], bool(entry["shares"])) for entry in listed] == [("test_000.png", True), ("test_001.png", True)]


def test_after_a_kill_the_same_command_goes_on_below_the_photos(model: nn.Module, photos: Path) -> None:
    out = photos / "masks"
    answers = predictions(model, str(photos), out=out)
    next(answers)
    next(answers)  # the first is written, and the process dies
    del answers
    assert len(list(predictions(model, str(photos), out=out))) == 2
    assert len(list(predictions(model, str(photos), out=out))) == 2


def test_a_mask_that_is_named_itself_is_predicted(model: nn.Module, photos: Path) -> None:
    list(written(model, photos, photos / "masks"))
    assert len(list(predictions(model, str(photos / "masks/test_000.png")))) == 1


@pytest.mark.parametrize("size", [(40, 62), (9, 13)])
@pytest.mark.parametrize("views", [Views(), Views(scales=(0.75, 1.0), flip=True)])
def test_a_large_mask_is_made_in_strips(size: tuple[int, int], views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = segment(lopsided, X, size, (9, 9), views)[0].argmax(0)
    maps = seen(lopsided, X, (9, 9), views)
    assert torch.equal(likeliest(maps, size, views).long(), wanted)
    monkeypatch.setattr("repvgg.models.views.AT_ONCE", 3 * 62 * 4)
    strips = likeliest(maps, size, views)
    assert strips.shape == size
    assert (strips.long() == wanted).float().mean() > 0.999  # but for ties, in the last digit


def test_a_mask_that_was_deleted_is_made_again(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    list(written(model, photos, tmp_path / "masks"))
    (tmp_path / "masks/test_000.png").unlink()
    assert len(list(written(model, photos, tmp_path / "masks"))) == 2


def test_a_list_of_somebody_else_is_not_overwritten(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "masks.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(FileError, match=r"masks.json: was not made by repvgg predict"):
        list(written(model, photos / "test_000.png", tmp_path))
