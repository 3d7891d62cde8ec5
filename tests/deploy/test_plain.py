"""plain.py: surgery that changes no function, against float64."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import randomize, relative_error
from torch import Tensor, nn

from repvgg import zoo
from repvgg.algebra import ReparamError
from repvgg.deploy.plain import equalise, insert_bn, plain_net
from repvgg.models import is_deploy_form
from repvgg.reparam import reparameterize


def deploy(name: str = "repvgg_micro", width: float = 0.25) -> nn.Module:
    model = zoo.create_model(name, num_classes=5, width=width, small_input=True)
    return reparameterize(randomize(model, (16, 3, 16, 16)))


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
    assert relative_error(exact(even, images), exact(model, images)) < 1e-12
    first, second = (even.get_submodule(f"stages.2.{i}.block.weight".removesuffix(".weight")) for i in (1, 2))
    made = first.weight.abs().amax((1, 2, 3))  # type: ignore[operator, union-attr]
    weight = second.weight  # type: ignore[union-attr]
    groups = second.groups
    used = weight.view(groups, -1, *weight.shape[1:]).abs().amax((1, 3, 4)).flatten()  # type: ignore[operator, union-attr]
    assert float((made / used).log().abs().max()) < 0.05


@pytest.mark.parametrize("make", [lambda: deploy(), lambda: plain_net(deploy())], ids=["family", "layers alone"])
def test_inserted_batch_norms_change_nothing_train_and_fold_back(make: Callable[[], nn.Module], images: Tensor) -> None:
    model = make()
    open_again = insert_bn(model, images)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in open_again.modules()) == 10
    assert relative_error(exact(open_again, images), exact(model, images)) < 1e-5
    folded = reparameterize(open_again)
    assert not folded.fold_report.left  # type: ignore[union-attr]
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert relative_error(exact(folded, images), exact(model, images)) < 1e-5
    open_again.train()(images).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in open_again.parameters())


def test_a_member_with_inserted_batch_norms_is_its_plain_training_form(images: Tensor, tmp_path: Path) -> None:
    model = insert_bn(deploy(), images)
    zoo.save(model, tmp_path / "m.safetensors")
    again = zoo.load(tmp_path / "m.safetensors")
    manifest = zoo.manifest_of(again)
    assert manifest.arch is not None
    assert (manifest.form, manifest.arch["block"]) == ("training", "plain")
    assert relative_error(exact(again, images), exact(model, images)) < 1e-12
    assert is_deploy_form(reparameterize(again))


def test_a_net_known_by_its_layers_alone_saves_and_loads(images: Tensor, tmp_path: Path) -> None:
    model = deploy()
    net = plain_net(model)
    zoo.save(net, tmp_path / "m.safetensors")
    again = zoo.load(tmp_path / "m.safetensors")
    assert zoo.manifest_of(again).arch is None
    assert relative_error(exact(again, images), exact(model, images)) < 1e-12


def test_what_is_not_plain_is_refused(images: Tensor) -> None:
    with pytest.raises(ReparamError, match="is no plain network in deploy form: fold a RepVGG first"):
        equalise(zoo.create_model("repvgg_micro", width=0.25).eval())
    with pytest.raises(ReparamError, match="a network with squeeze-excite is not plain"):
        equalise(zoo.create_model("repvgg_d2se", width=0.03, deploy=True).eval())
    with pytest.raises(ReparamError, match="is in train mode"):
        insert_bn(deploy().train(), images)
