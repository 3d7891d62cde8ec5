"""plain.py: surgery that changes no function, against float64."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomize, relative_error
from rounding import rounding
from torch import Tensor, nn

from repvgg.deploy.surgery import equalise, insert_bn
from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.models.plain import PlainNet, layer_list


def deploy(name: str = "repvgg_micro", width: float = 0.25) -> nn.Module:
    model = zoo.create_model(name, num_classes=5, width=width, small_input=True)
    return reparameterize(randomize(model, (16, 3, 16, 16)))


def by_its_layers(model: nn.Module) -> nn.Module:
    net = PlainNet(layer_list(model) or [])
    net.load_state_dict(model.state_dict())
    return zoo.remember(net.eval(), replace(zoo.manifest_of(model), arch=None))


@torch.no_grad()
def exact(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = copy.deepcopy(model).double()(images.double())
    return logits


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize(("name", "width"), [("repvgg_micro", 0.25), ("repvgg_b1g4", 0.0625)])
def test_equalising_changes_no_logits_and_evens_the_ranges(name: str, width: float, images: Tensor) -> None:
    model = deploy(name, width).double()
    even = equalise(model)
    assert relative_error(exact(even, images), exact(model, images)) <= rounding(model, images.double())
    first, second = (even.get_submodule(f"stages.2.{i}.block") for i in (1, 2))
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    made = first.weight.abs().amax((1, 2, 3))
    used = second.weight.view(second.groups, -1, *second.weight.shape[1:]).abs().amax((1, 3, 4)).flatten()
    assert (made / used).log().abs().max().item() < 0.05


def test_inserted_batch_norms_change_nothing_train_and_fold_back(images: Tensor, tmp_path: Path) -> None:
    model = deploy()
    training = insert_bn(model, images)
    assert not training.training
    assert sum(isinstance(m, nn.BatchNorm2d) for m in training.modules()) == 10
    assert relative_error(exact(training, images), exact(model, images)) <= rounding(model, images)
    fresh = torch.randn(4, 3, 16, 16)  # images that they have not seen
    assert relative_error(exact(training, fresh), exact(model, fresh)) <= rounding(model, fresh)
    folded = reparameterize(training)
    assert not folded.fold_report.left  # type: ignore[union-attr]
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert relative_error(exact(folded, images), exact(model, images)) <= rounding(model, images)
    save(training, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    manifest = zoo.manifest_of(again)
    assert manifest.arch is not None
    assert (manifest.form, manifest.arch["block"]) == ("training", "plain")
    assert torch.equal(again(images), training(images))
    training.train()(images).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in training.parameters())


def test_their_statistics_are_those_of_the_images(images: Tensor) -> None:
    training = insert_bn(deploy(), images)
    still, moving = exact(training, images), exact(training.train(), images)
    assert relative_error(moving, still) <= rounding(training.eval(), images)


def test_what_is_not_plain_is_refused(images: Tensor) -> None:
    with pytest.raises(ReparamError, match="is no plain network in deploy form: fold a RepVGG first"):
        equalise(zoo.create_model("repvgg_micro", width=0.25).eval())
    with pytest.raises(ReparamError, match="a network with squeeze-excite is not plain"):
        equalise(zoo.create_model("repvgg_d2se", width=0.03, deploy=True).eval())
    with pytest.raises(ReparamError, match="is in train mode"):
        insert_bn(deploy().train(), images)
    with pytest.raises(ReparamError, match="is no plain network in deploy form"):
        insert_bn(zoo.create_model("repvgg_micro", width=0.25).eval(), images)
    with pytest.raises(ReparamError, match="known by its layers alone has no training form"):
        insert_bn(by_its_layers(deploy()), images)
