"""train/tasks.py: one object answers what differs between labels and masks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import centred, randomize, varied

from repvgg.data import open_source
from repvgg.models import zoo
from repvgg.models.views import WHOLE, Views
from repvgg.train.evaluate import batches, evaluate_model
from repvgg.train.segmentation import SEGMENTATION
from repvgg.train.tasks import CLASSIFICATION, task_of, task_of_model


def small(name: str = "repvgg_micro", **options: Any) -> torch.nn.Module:
    return zoo.create_model(name, **{"num_classes": 10, "in_chans": 1, "width": 0.25, **options}).eval()


def test_sources_models_and_manifests_are_of_one_task() -> None:
    digits = open_source("digits")
    assert task_of(digits) is CLASSIFICATION
    assert task_of(replace(digits, masks=True)) is SEGMENTATION
    for name in ("repvgg_micro", "resnet18"):
        model = zoo.create_model(name, num_classes=2)
        assert task_of_model(model) is task_of_model(zoo.manifest_of(model)) is CLASSIFICATION
    for name in ("pspnet_repvgg_micro", "pspnet_repvgg_micro_fast"):
        assert task_of_model(small(name)) is SEGMENTATION
    assert task_of_model(zoo.create_model("repvgg_micro", deploy=True)) is CLASSIFICATION
    assert (CLASSIFICATION.kind, SEGMENTATION.kind) == ("labels", "masks")
    with pytest.raises(ValueError, match="was not made by"):
        task_of_model(torch.nn.ReLU())


def test_what_does_not_fit_is_refused() -> None:
    digits = open_source("digits")
    CLASSIFICATION.check(small(), digits)
    with pytest.raises(ValueError, match="takes images of 3 channels"):
        CLASSIFICATION.check(small(in_chans=3), digits)
    with pytest.raises(ValueError, match="a PSPNet gives masks"):
        CLASSIFICATION.check(small("pspnet_repvgg_micro"), digits)
    with pytest.raises(ValueError, match="has masks, which RepVGG does not give"):
        SEGMENTATION.check(small(), digits)
    with pytest.raises(ValueError, match="takes images of 3 channels"):
        SEGMENTATION.check(small("pspnet_repvgg_micro", in_chans=3), digits)


def test_only_masks_have_views() -> None:
    CLASSIFICATION.check_views(WHOLE)
    SEGMENTATION.check_views(Views(flip=True))
    with pytest.raises(ValueError, match="--slide, --scales and --flip are for a PSPNet"):
        CLASSIFICATION.check_views(Views(flip=True))


def test_a_split_is_evaluated_through_the_task() -> None:
    digits, model = open_source("digits").limited(50), randomize(small(small_input=True), (32, 1, 16, 16))
    zoo.remember(model, replace(zoo.manifest_of(model), preprocessing=digits.preprocessing))
    images, _ = next(batches(digits.val, digits.preprocessing, 50))
    model = centred(model, images)
    for split in ("train", "val"):
        got = CLASSIFICATION.evaluate_model(model, digits, split, batch_size=16)
        expected = evaluate_model(model, replace(digits, val=digits.split(split)))
        assert varied(expected.confusion.sum(0))
        assert torch.equal(got.confusion, expected.confusion)
    with pytest.raises(ValueError, match="has no split called test"):
        CLASSIFICATION.evaluate_model(model, digits, "test")
    with pytest.raises(ValueError, match="this model gives labels"):
        CLASSIFICATION.evaluate_model(model, digits, views=Views(slide=True))
