"""load.py: models there and back through files, with all that they remember."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from foreign import FORMS
from members import DTYPES, EVERY_MEMBER, IMAGES, assert_round_trip, assert_same_tensors, logits, member, narrow
from rounding import rounding
from torch import nn

import repvgg
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import checkpoint, zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import FAMILY
from repvgg.models.plain import PlainNet
from repvgg.models.repvgg import RepVGG


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EVERY_MEMBER)
def test_trap_3_a_deploy_form_loads_what_reparameterize_saved(name: str, form: str, tmp_path: Path) -> None:
    model = member(name, form)
    back = assert_round_trip(model, tmp_path / "model.safetensors")
    assert zoo.manifest_of(back).form == form
    built = zoo.create_model(name, num_classes=7, width=1 / 8, deploy=form == "deploy").eval()
    built.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(built), logits(model))


@pytest.mark.parametrize("name", EVERY_MEMBER)
def test_the_layer_list_is_the_network(name: str, tmp_path: Path) -> None:
    model = member(name, "deploy")
    repvgg.save(model, tmp_path / "model.safetensors")
    tensors, manifest = checkpoint.read(tmp_path / "model.safetensors")
    assert manifest is not None
    assert manifest.layers is not None
    assert [spec["op"] for spec in manifest.layers if spec["op"] != "squeeze_excite"] == [
        *["conv2d"] * (1 + sum(FAMILY[name].depths)),
        "global_avg_pool",
        "linear",
    ]
    checkpoint.write(tmp_path / "layers.safetensors", tensors, replace(manifest, arch=None))
    plain = repvgg.load(tmp_path / "layers.safetensors")
    assert isinstance(plain, PlainNet)
    assert torch.equal(logits(plain), logits(model))
    assert_round_trip(plain, tmp_path / "again.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes_survive(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = narrow(form=form).to(dtype)
    for suffix in (".safetensors", ".pth"):
        back = assert_round_trip(model, tmp_path / f"model{suffix}")
        assert {p.dtype for p in back.parameters()} == {dtype}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"output_stride": 8},
        {"output_stride": 16, "small_input": True},
        {"small_input": True},
        {"in_chans": 1},
        {"in_chans": 5, "num_classes": 1},
        {"width": 0.37},
        {"block": "plain"},
        {"block": "no_identity"},
        {"block": "no_1x1"},
        {"block": "post_bn"},
        {"block": "dirac"},
        {"block": "dbb"},
    ],
    ids=str,
)
def test_options_survive(options: dict[str, Any], form: str, tmp_path: Path) -> None:
    model = narrow(form=form, **options)
    defaults = {"output_stride": 32, "small_input": False, "in_chans": 3, "block": "repvgg", "global_pool": "avg", "drop_rate": 0.0}
    wanted = {"name": "repvgg_micro", "num_classes": 7, "width": 1 / 8, **defaults}
    for suffix in (".safetensors", ".pth"):
        back = assert_round_trip(model, tmp_path / f"model{suffix}")
        assert zoo.manifest_of(back).arch == {**wanted, **options}


@pytest.mark.parametrize(
    ("name", "form"),
    [("resnet18", "training"), ("resnet18", "deploy"), pytest.param("efficientnet_b0", "deploy", marks=pytest.mark.slow)],
)
def test_comparators_there_and_back(name: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = randomize(zoo.create_model(name, num_classes=7), (4, 3, 64, 64))
    assert_round_trip(reparameterize(model) if form == "deploy" else model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_member_there_and_back(form: str, tmp_path: Path) -> None:
    model = randomize(zoo.create_model("repvgg_a0"))
    assert_round_trip(reparameterize(model) if form == "deploy" else model, tmp_path / "a0.safetensors")


def test_what_the_model_remembers_survives(tmp_path: Path) -> None:
    model = narrow(num_classes=3)
    preprocessing = Preprocessing((3, 48, 40), 50, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    training = {"data": "cats", "epoch": 3, "val_top1": 0.75, "recipe": {"lr": 0.1, "mixup": None}}
    classes = ["Siamese", "Persian", "hé l\u200b\n"]
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"model{suffix}"
        repvgg.save(model, path, classes=classes, preprocessing=preprocessing, training=training)
        back = zoo.manifest_of(repvgg.load(path))
        assert (back.classes, back.preprocessing, back.training) == (classes, preprocessing, training)
        folded = zoo.manifest_of(reparameterize(repvgg.load(path)))
        assert folded == replace(back, form="deploy", layers=folded.layers)
        repvgg.save(repvgg.load(path), tmp_path / "again.safetensors")  # nothing said: what it carries
        assert zoo.manifest_of(repvgg.load(tmp_path / "again.safetensors")) == back


def test_a_new_classifier_forgets_the_old_names(tmp_path: Path) -> None:
    model = narrow(num_classes=3)
    repvgg.save(model, tmp_path / "old.safetensors", classes=["a", "b", "c"])
    model = repvgg.load(tmp_path / "old.safetensors")
    assert isinstance(model, RepVGG)
    model.reset_classifier(5)
    back = zoo.manifest_of(assert_round_trip(model, tmp_path / "new.safetensors"))
    assert back.classes is None
    assert back.arch is not None
    assert back.arch["num_classes"] == 5


def test_contradictions_are_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = narrow()
    with pytest.raises(ValueError, match="2 class names do not fit 7 outputs"):
        repvgg.save(model, path, classes=["a", "b"])
    with pytest.raises(ValueError, match="1 channels does not fit in_chans=3"):
        repvgg.save(model, path, preprocessing=Preprocessing((1, 8, 8), 8, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ValueError, match="no key scheme 'keras'"):
        repvgg.save(model, path, to_keys="keras")
    with pytest.raises(ValueError, match="RepVGG family only"):
        repvgg.save(repvgg.create_model("resnet18"), path, to_keys="timm")
    with pytest.raises(ValueError, match="Linear was not made by"):
        repvgg.save(nn.Linear(2, 2), path)
    with torch.no_grad():
        model.get_buffer("stem.block.conv_kxk.bn.running_var")[0] = -1
    with pytest.raises(FileError, match=r"not written, stem\.block\.conv_kxk\.bn\.running_var has a negative variance"):
        repvgg.save(model, path)
    assert not list(tmp_path.iterdir())


def test_a_wrapper_is_not_taken_for_the_model(tmp_path: Path) -> None:
    class Wrapper(nn.Module):  # as torch.compile's: all attributes of the model, other names for its tensors
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

    with pytest.raises(ValueError, match="Wrapper was not made by"):
        repvgg.save(Wrapper(narrow()), tmp_path / "model.safetensors")


def test_channels_last_and_views_are_written_as_they_read(tmp_path: Path) -> None:
    model = narrow(form="deploy")
    repvgg.save(model.to(memory_format=torch.channels_last), tmp_path / "model.safetensors")  # type: ignore[call-overload]
    back = repvgg.load(tmp_path / "model.safetensors")
    assert_same_tensors(back, model)
    repvgg.save(back, tmp_path / "model.pth")  # its tensors are views of the mapped file
    assert_same_tensors(repvgg.load(tmp_path / "model.pth"), model)
    assert (tmp_path / "model.pth").stat().st_size < 2 * (tmp_path / "model.safetensors").stat().st_size


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    repvgg.save(narrow(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    model = repvgg.load(tmp_path / "model.safetensors").train()
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_pruned_net_loads_from_its_layers_alone(tmp_path: Path) -> None:
    model = narrow(form="deploy")
    layers, tensors = copy.deepcopy(zoo.manifest_of(model).layers), model.state_dict()
    assert layers is not None
    first, second = layers[3], layers[4]
    tensors[first["weight"]][1::2] = 0  # silence every other channel, and then take it away
    tensors[first["bias"]][1::2] = 0
    wanted, allowed = logits(model), rounding(model, IMAGES)
    for name in (first["weight"], first["bias"]):
        tensors[name] = tensors[name][::2]
    tensors[second["weight"]] = tensors[second["weight"]][:, ::2]
    first["out_channels"] = second["in_channels"] = len(tensors[first["bias"]])
    checkpoint.write(tmp_path / "pruned.safetensors", tensors, Manifest(None, "deploy", list("abcdefg"), layers=layers))
    pruned = repvgg.load(tmp_path / "pruned.safetensors")
    assert relative_error(logits(pruned), wanted) <= allowed
    assert zoo.manifest_of(pruned).classes == list("abcdefg")
    assert_round_trip(pruned, tmp_path / "again.safetensors")
