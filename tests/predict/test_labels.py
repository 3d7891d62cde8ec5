"""predict.py: the same answers however the images are named, batched and stored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from rounding import REPORTED
from torch import nn

from repvgg.data import open_source
from repvgg.data.images import decode
from repvgg.data.transforms import eval_transform, normalise
from repvgg.models.manifest import Preprocessing
from repvgg.models.zoo import create_model, manifest_of, remember
from repvgg.predict.labels import predict
from repvgg.predict.prediction import Prediction
from repvgg.train.loop import new_model


@pytest.fixture(scope="module")
def grey() -> nn.Module:
    return randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25), (32, 1, 16, 16))


@pytest.fixture(scope="module")
def colour() -> nn.Module:
    model = randomize(create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True), (32, 3, 32, 32))
    manifest = replace(manifest_of(model), classes=["cat", "dog", "owl"], preprocessing=Preprocessing((3, 32, 32), 36))
    return remember(model, manifest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, a.jpg, deep/c.png (grey), deep/d.GIF and files that are no images."""
    random = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for name, size in (("b.png", (50, 40)), ("a.jpg", (40, 60)), ("deep/d.GIF", (33, 33))):
        smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        smooth.resize(size, Image.Resampling.BICUBIC).save(tmp_path / name)
    Image.fromarray(random.integers(0, 256, (16, 16)).astype(np.uint8)).save(tmp_path / "deep/c.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.jpg").write_bytes(b"macOS left this")
    return tmp_path


def test_probabilities_against_the_model_itself(colour: nn.Module, folder: Path) -> None:
    p = manifest_of(colour).preprocessing
    for answer in predict(colour, [str(folder)], top=5):
        with torch.no_grad():
            image = normalise(eval_transform(p)(decode(answer.path)).unsqueeze(0), p)
            expected = colour(image).double().softmax(1)[0]
        order = expected.argsort(descending=True).tolist()
        assert [label for label, _ in answer.labels] == [["cat", "dog", "owl"][i] for i in order]  # 3 of the 5 asked for
        assert [x for _, x in answer.labels] == pytest.approx(expected[order].tolist(), abs=REPORTED)
        assert answer.error is None
    assert [len(answer.labels) for answer in predict(colour, [str(folder)], top=1)] == [1] * 4


def same(a: list[Prediction], b: list[Prediction]) -> bool:
    def close(x: Prediction, y: Prediction) -> bool:
        names = [[label for label, _ in p.labels] for p in (x, y)]
        return (
            x.path == y.path
            and names[0] == names[1]
            and [v for _, v in x.labels] == pytest.approx([v for _, v in y.labels], abs=REPORTED)
        )

    return len(a) == len(b) and all(map(close, a, b))


def test_batches_of_any_size_give_the_same_answers(colour: nn.Module, folder: Path) -> None:
    alone = list(predict(colour, [str(folder)], batch_size=1))
    assert [Path(p.path).name for p in alone] == ["a.jpg", "b.png", "c.png", "d.GIF"]
    for batch_size in (2, 3, 100):
        assert same(alone, list(predict(colour, [str(folder)], batch_size)))


def test_bad_images_among_good_ones(colour: nn.Module, folder: Path) -> None:
    good = list(predict(colour, [str(folder)]))
    (folder / "aa.png").write_bytes(b"damaged")
    (folder / "zz.jpg").write_bytes((folder / "a.jpg").read_bytes()[:100])
    for batch_size in (1, 2, 32):
        answers = list(predict(colour, [str(folder)], batch_size))
        assert [Path(p.path).name for p in answers if p.error] == ["aa.png", "zz.jpg"]
        assert all(p.error is None or (p.error.startswith(f"{p.path}: not an image") and not p.labels) for p in answers)
        assert same(good, [p for p in answers if p.error is None])


def test_a_grey_model_reads_colour_and_a_colour_model_grey(grey: nn.Module, colour: nn.Module, folder: Path) -> None:
    assert len(list(predict(grey, [str(folder)]))) == 4
    assert not any(p.error for p in predict(grey, [str(folder)]))
    image = Image.open(folder / "deep/c.png")
    image.convert("RGB").save(folder / "rgb.png")
    for model in (grey, colour):  # equal channels are grey
        a, b = ([p.labels for p in predict(model, [str(folder / name)])] for name in ("deep/c.png", "rgb.png"))
        assert a == b


def test_classes_without_names_are_numbers(folder: Path) -> None:
    model = randomize(create_model("repvgg_micro", num_classes=4, width=0.25, small_input=True), (32, 3, 32, 32))
    answer = next(predict(model, [str(folder)]))
    assert sorted(label for label, _ in answer.labels) == ["0", "1", "2", "3"]


def test_half_precision(colour: nn.Module, folder: Path) -> None:
    expected = list(predict(colour, [str(folder)]))
    got = list(predict(remember(create_copy(colour), manifest_of(colour)).bfloat16(), [str(folder)]))
    for a, b in zip(expected, got, strict=True):
        assert dict(b.labels) == pytest.approx(dict(a.labels), abs=0.1)


def create_copy(model: nn.Module) -> nn.Module:
    twin = create_model("repvgg_micro", num_classes=3, width=0.25, small_input=True)
    twin.load_state_dict(model.state_dict())
    return twin


def test_what_makes_no_sense_is_said(colour: nn.Module, folder: Path) -> None:
    for batch_size, top in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="--batch-size and --top are at least 1"):
            list(predict(colour, [str(folder)], batch_size, top))
    with pytest.raises(ValueError, match="no images: name files, folders or globs"):
        list(predict(colour, []))
    four = create_model("repvgg_micro", num_classes=3, in_chans=4, width=0.25, small_input=True)
    with pytest.raises(ValueError, match=r"1 .grey. or 3 .RGB. channels, not 4"):
        list(predict(four, [str(folder)]))
