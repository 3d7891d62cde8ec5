"""weights.py: the network in other people's checkpoints is found by its keys, and its tensors are the ones that were saved."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from torch import Tensor, nn

import repvgg
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import keys, weights
from repvgg.models.convert import convert
from repvgg.models.plain import PlainNet
from repvgg.models.zoo import manifest_of

WIDTH = 1 / 32


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return randomize(repvgg.create_model("repvgg_micro", num_classes=3, width=WIDTH), (4, 3, 64, 64))


@pytest.fixture(scope="module")
def official(network: nn.Module) -> dict[str, Tensor]:
    return keys.to_foreign(network.state_dict(), "official")


class Node(dict[str, Any]):
    """As yacs has them."""


def other() -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in repvgg.create_model("repvgg_micro", width=WIDTH).state_dict().items()}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda t: t,
    "official training checkpoint": lambda t: {
        "model": t,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "config": Node(MODEL=Node(ARCH="RepVGG-A0"), sizes=[1, 2]),
        "epoch": 119,
        "max_accuracy": 72.4,
    },
    "ema before model": lambda t: {"model": keys.to_foreign(other(), "official"), "ema": t},
    "model_ema of timm": lambda t: {"state_dict": keys.to_foreign(other(), "official"), "state_dict_ema": t, "arch": "repvgg"},
    "net": lambda t: {"net": t, "acc": 93.1},
    "averaged": lambda t: {"ema": {"n_averaged": torch.tensor(5), **prefixed("module.", t)}},
    "Lightning": lambda t: {
        "state_dict": {**prefixed("model.", t), "loss.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "callbacks": {"checkpoint": {"best": torch.tensor(1.0)}},
    },
    "Lightning with an average": lambda t: {
        "state_dict": {**prefixed("net.", keys.to_foreign(other(), "official")), **prefixed("ema_net.", t)}
    },
    "compiled and parallel": lambda t: {"model": prefixed("_orig_mod.module.", t)},
    "inside a detector": lambda t: {"model": {**prefixed("encoder.", t), "neck.conv.weight": torch.ones(2, 2)}},
    "leaked identity": lambda t: {**t, "stage1.1.rbr_dense.id_tensor": torch.ones(2, 2, 3, 3)},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_the_network_is_found_wherever_it_lies(how: str, official: dict[str, Tensor], network: nn.Module, tmp_path: Path) -> None:
    torch.save(WRAPPED[how](official), tmp_path / "a.pth")
    model = repvgg.load(tmp_path / "a.pth")
    got = model.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(got[name], tensor), name


def test_what_is_left_out_is_told(official: dict[str, Tensor], tmp_path: Path) -> None:
    leaked = {f"stage{i}.1.rbr_dense.id_tensor": torch.ones(2) for i in (1, 2)}
    torch.save({**official, **leaked}, tmp_path / "a.pth")
    assert weights.read(tmp_path / "a.pth")[2] == list(leaked)
    said: list[str] = []
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", log=said.append)
    assert said[0] == "left out, as no part of the network: stage1.1.rbr_dense.id_tensor and 1 more"
    assert manifest_of(repvgg.load(tmp_path / "a.pth")).training == {"left_out": "stage1.1.rbr_dense.id_tensor and 1 more"}
    assert manifest_of(repvgg.load(tmp_path / "b.safetensors")).training == {}  # nothing of that file was left out


@pytest.mark.parametrize("scheme", ["repvgg", *keys.SCHEMES])
@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_a_backbone_opens_as_one(prefix: str, form: str, scheme: str, network: nn.Module, tmp_path: Path) -> None:
    whole = network if form == "training" else reparameterize(network)
    spelled = whole.state_dict() if scheme == "repvgg" else keys.to_foreign(whole.state_dict(), scheme)
    spelled = {name: t for name, t in spelled.items() if not re.match(r"(head|linear)\.", name)}
    if scheme == "mmpretrain" and prefix == "backbone.":
        prefix = ""  # it has that already
    torch.save({"state_dict": prefixed(prefix, spelled)}, tmp_path / "a.pth")
    model: Any = repvgg.load(tmp_path / "a.pth")
    manifest = manifest_of(model)
    assert manifest.arch is not None
    assert (manifest.form, manifest.arch["num_classes"]) == (form, 0)
    x = torch.randn(2, 3, 64, 64)
    wanted = whole.forward_features(x)  # type: ignore[operator]
    assert torch.equal(model(x), wanted)
    repvgg.save(model, tmp_path / "b.safetensors")
    assert torch.equal(repvgg.load(tmp_path / "b.safetensors")(x), wanted)
    if form == "deploy":
        layers = manifest.layers or []
        assert layers[-1]["op"] == "conv2d"
        plain = PlainNet(layers)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(x), wanted)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


def test_a_mmpretrain_backbone_without_its_prefix(network: nn.Module, tmp_path: Path) -> None:
    spelled = keys.to_foreign(network.state_dict(), "mmpretrain")
    inner = {name.removeprefix("backbone."): t for name, t in spelled.items() if not name.startswith("head.")}
    torch.save(inner, tmp_path / "a.pth")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(repvgg.load(tmp_path / "a.pth")(x), network.forward_features(x))  # type: ignore[operator]


def test_a_variance_of_zero_is_no_damage_and_a_negative_one_is(official: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {name: t.clone() for name, t in official.items()}
    changed["stage1.0.rbr_dense.bn.running_var"][0] = 0.0
    torch.save(changed, tmp_path / "a.pth")
    model = repvgg.load(tmp_path / "a.pth")
    deploy = repvgg.reparameterize(model.double())
    assert repvgg.verify(model.double(), deploy, (3, 64, 64)).ok
    changed["stage1.0.rbr_dense.bn.running_var"][0] = -1e-9
    torch.save(changed, tmp_path / "a.pth")
    with pytest.raises(FileError, match=r"stage1.0.rbr_dense.bn.running_var has a negative variance"):
        repvgg.load(tmp_path / "a.pth")
