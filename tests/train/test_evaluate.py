"""train/evaluate.py against counts made with NumPy."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import centred, randomize, varied

from repvgg.data import open_source
from repvgg.data.transforms import BadImages, Transformed, eval_transform, normalise
from repvgg.models import zoo
from repvgg.models.manifest import Manifest
from repvgg.train.distributed import World
from repvgg.train.evaluate import Accuracy, batches, check_fit, evaluate, evaluate_model, told_apart
from repvgg.train.loop import new_model

ABSENT = (2, 6)


def drawn(classes: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels among which some classes are absent."""
    random = np.random.default_rng(classes)
    labels = random.choice([c for c in range(classes) if c not in ABSENT], count)
    return torch.from_numpy(random.normal(size=(count, classes)) + 2 * np.eye(classes)[labels]).float(), torch.from_numpy(labels)


def counted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[Accuracy, list[float]]:
    """The same by sorting and counting, image by image."""
    x, y = logits.double().numpy(), labels.numpy()
    order = (-x).argsort(1)
    confusion = np.zeros((x.shape[1], x.shape[1]), int)
    for true, predicted in zip(y, order[:, 0], strict=True):
        confusion[true, predicted] += 1
    top1, top5 = ([true in row[:k] for true, row in zip(y, order, strict=True)] for k in (1, 5))
    loss = float(np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y]))
    per_class = [float(np.mean(order[y == c, 0] == c)) if (y == c).any() else math.nan for c in range(x.shape[1])]
    return Accuracy(len(y), loss, float(np.mean(top1)), float(np.mean(top5)), torch.from_numpy(confusion)), per_class


@pytest.mark.parametrize("classes", [2, 4, 5, 9, 40])
@pytest.mark.parametrize("batch_size", [200, 64, 1])
def test_accuracy_against_numpy(classes: int, batch_size: int) -> None:
    logits, labels = drawn(classes)
    got = evaluate(lambda x: x, zip(logits.split(batch_size), labels.split(batch_size), strict=True), classes)
    expected, per_class = counted(logits, labels)
    assert got.images == 200
    assert got.top1 == expected.top1
    assert got.top5 == expected.top5
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert torch.equal(got.confusion, expected.confusion)
    assert got.per_class == pytest.approx(per_class, nan_ok=True)
    assert [math.isnan(share) for share in got.per_class] == [c in ABSENT for c in range(classes)]


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(ValueError, match="there are no images"):
        evaluate(lambda x: x, [], 3)


def test_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match="the model has 4 classes, the data 3"):
        evaluate(lambda x: x, [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))], 3)


def digits_model(**options: Any) -> torch.nn.Module:
    return randomize(new_model("repvgg_micro", open_source("digits"), log=str, width=0.25, **options), (32, 1, 16, 16))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_a_model_on_a_source(tmp_path: Path) -> None:
    source = open_source("digits")
    scans = Transformed(source.val, eval_transform(source.preprocessing))
    images = normalise(torch.stack([scans[i][0] for i in range(360)]), source.preprocessing)
    model = centred(digits_model(), images)
    with torch.no_grad():
        expected, _ = counted(model(images), torch.tensor([scans[i][1] for i in range(360)]))
    for batch_size, workers in ((64, 0), (7, 0), (150, 2)):
        bad = BadImages(tmp_path / "bad.txt", replace=False) if workers else None  # then images are read one by one
        got = evaluate_model(model, source, batch_size, workers, bad=bad)
        assert got.images == 360
        assert varied(got.confusion.sum(0))
        assert got.top1 == expected.top1
        assert torch.equal(got.confusion, expected.confusion)
        assert got.loss == pytest.approx(expected.loss, rel=1e-4)
    half = evaluate_model(model.bfloat16(), source)
    assert half.loss == pytest.approx(expected.loss, rel=0.1)


@pytest.mark.parametrize("read", [False, True])
def test_batches_are_in_order(read: bool, tmp_path: Path) -> None:
    source = open_source("digits").limited(10)
    bad = BadImages(tmp_path / "bad.txt", replace=False) if read else None
    wanted = [source.val[i][1] for i in range(10)]
    labels = [y for _, y in batches(source.val, source.preprocessing, 4, bad=bad)]
    assert [len(y) for y in labels] == [4, 4, 2]
    assert torch.cat(labels).tolist() == wanted
    for rank in range(3):
        share = batches(source.val, source.preprocessing, 4, bad=bad, world=World(rank, 3))
        assert torch.cat([y for _, y in share]).tolist() == wanted[rank::3]


def test_what_does_not_fit_is_said() -> None:
    source = open_source("digits")
    with pytest.raises(ValueError, match="--batch-size 0: at least 1"):
        evaluate_model(digits_model(), source, batch_size=0)
    colour = zoo.create_model("repvgg_micro", num_classes=10, small_input=True)
    with pytest.raises(ValueError, match="the model takes images of 3 channels, those of digits have 1"):
        evaluate_model(colour, source)
    for classes in (None, ["a", "b", "c"]):
        three = zoo.create_model("repvgg_micro", num_classes=3, in_chans=1, small_input=True)
        zoo.remember(three, replace(zoo.manifest_of(three), classes=classes))
        with pytest.raises(ValueError, match=r"3 classes, .* 10"):
            evaluate_model(three.eval(), source)


def test_the_same_classes_in_another_order_are_refused_and_other_names_told_apart() -> None:
    source = replace(open_source("digits"), classes=["cat", "dog"])
    check_fit(Manifest(None, preprocessing=source.preprocessing), source)
    for names, apart in (
        (["cat", "dog"], {}),
        (["wolf", "dog"], {0: ("wolf", "cat")}),
        (["n01", "n02"], {0: ("n01", "cat"), 1: ("n02", "dog")}),
    ):
        manifest = Manifest(None, classes=names, preprocessing=source.preprocessing)
        check_fit(manifest, source)
        assert told_apart(manifest, source) == apart
    swapped = Manifest(None, classes=["dog", "cat"], preprocessing=source.preprocessing)
    with pytest.raises(ValueError, match=r"digits: its classes .* in another order \(number 0 is 'cat', the model's 'dog'\): give"):
        check_fit(swapped, source)
