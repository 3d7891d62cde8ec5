"""zoo.py: models by name, files there and back, other implementations' checkpoints, and the hub on a small server of our own."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from foreign import CONTAINERS, FORMS, NARROW, SCHEMES, state, timm_net
from hub_server import HubServer, serving
from PIL import Image
from rounding import rounding
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import repvgg
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import baselines, checkpoint, pretrained, zoo
from repvgg.models.checkpoint import METADATA_KEY
from repvgg.models.load import open_model
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import FAMILY, resolve_name
from repvgg.models.plain import PlainNet
from repvgg.models.repvgg import RepVGG

Tensors = dict[str, Tensor]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def narrow(name: str = "repvgg_micro", form: str = "training", **options: Any) -> nn.Module:
    """A narrow member on random statistics, in eval mode."""
    model = zoo.create_model(name, **{"num_classes": 7, "width": 1 / 8, **options})
    randomize(model, (4, options.get("in_chans", 3), 64, 64))
    return reparameterize(model) if form == "deploy" else model


@cache
def member(name: str, form: str) -> nn.Module:
    """As `narrow`. Shared between tests: not to be changed."""
    return reparameterize(member(name, "training")) if form == "deploy" else narrow(name)


def logits(model: nn.Module, side: int = 64) -> Tensor:
    """Of the same two random images for every model; float64."""
    like = next(model.parameters())
    x = torch.randn(2, zoo.manifest_of(model).preprocessing.input_size[0], side, side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x.to(like)).double()  # type: ignore[no-any-return]


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    for name in x:
        assert x[name].dtype == y[name].dtype
        assert torch.equal(x[name], y[name]), name


def assert_round_trip(model: nn.Module, path: Path, side: int = 64) -> nn.Module:
    repvgg.save(model, path)
    back = repvgg.load(path)
    assert type(back) is type(model)
    assert_same_tensors(back, model)
    assert torch.equal(logits(back, side), logits(model, side))
    assert zoo.manifest_of(back) == zoo.manifest_of(model)
    assert not any(m.training for m in back.modules())
    return back


# --------------------------------------------------------------------------------------------------------- models by name


def test_the_papers_spelling_is_accepted() -> None:
    assert resolve_name("RepVGG-A0") == "repvgg_a0"
    assert resolve_name("RepVGG-B2g4") == "repvgg_b2g4"
    assert resolve_name("RepVGG-D2se") == "repvgg_d2se"
    assert isinstance(repvgg.create_model("RepVGG-A0", width=0.1), RepVGG)
    assert {"repvgg_a0", "repvgg_b3g4", "repvgg_d2se", "resnet18", "efficientnet_b0"} <= set(repvgg.list_models())


def test_an_unknown_name_lists_the_close_ones() -> None:
    with pytest.raises(ValueError, match=r"no model 'repvgg_b2g8': did you mean .*repvgg_b2g4"):
        repvgg.create_model("repvgg_b2g8")
    with pytest.raises(ValueError, match="resnet18"):
        repvgg.create_model("resnet-19")
    with pytest.raises(ValueError, match="see repvgg info"):
        repvgg.create_model("???")


@pytest.mark.parametrize("options", [{"width": 0.5}, {"small_input": True}, {"output_stride": 8}])
def test_comparators_take_no_options_of_the_family(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"resnet18 takes no {next(iter(options))}"):
        repvgg.create_model("resnet18", **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"in_chans": 0}, "in_chans"),
        ({"width": 0.0}, "width"),
        ({"width": float("nan")}, "width"),
        ({"output_stride": 4}, "output_stride"),
        ({"block": "nonsense"}, "no block 'nonsense'"),
        ({"pretrained": True, "width": 0.5}, "pretrained"),
        ({"pretrained": True, "in_chans": 1}, "pretrained"),
        ({"pretrained": True, "num_classes": 0}, "num_classes"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "pretrained_file", lambda *_: pytest.fail("fetched before the options were looked at"))
    with pytest.raises(ValueError, match=reason):
        repvgg.create_model("repvgg_a0", **options)


def test_the_residual_reorganisation_there_and_back(tmp_path: Path) -> None:
    """Table 7's: its layers are plain unless other blocks are asked for, and it has no list of layers, being no stack of them."""
    model = randomize(repvgg.create_model("repvgg_b0_residual", num_classes=5, width=0.125))
    assert zoo.manifest_of(model).arch["block"] == "plain"  # type: ignore[index]
    assert zoo.takes("repvgg_b0_residual", "small_input")
    for form in (model, reparameterize(model)):
        repvgg.save(form, tmp_path / "a.safetensors")
        again = repvgg.load(tmp_path / "a.safetensors")
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(again(x), form(x))
        assert zoo.manifest_of(again).layers is None
        with pytest.raises(ValueError, match="timm keys exist for the RepVGG family only"):
            repvgg.save(form, tmp_path / "b.safetensors", to_keys="timm")


def test_foreign_keys_know_one_block() -> None:
    model = repvgg.create_model("repvgg_micro", num_classes=5, width=0.25, block="acb").eval()
    with pytest.raises(ValueError, match="timm has no block 'acb': fold the model first"):
        repvgg.save(model, "nowhere.safetensors", to_keys="timm")


def test_weights_that_were_never_released() -> None:
    with pytest.raises(ValueError, match=r"no weights were released for repvgg_b1g2"):
        repvgg.create_model("repvgg_b1g2", pretrained=True)
    with pytest.raises(ValueError, match="takes no revision"):
        repvgg.create_model("resnet18", pretrained="v2")


def test_timms_weights_come_with_timms_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = baselines.create_baseline
    monkeypatch.setattr(baselines, "create_baseline", lambda *a, pretrained=False, **k: plain(*a, **k))  # without the fetch
    manifest = zoo.manifest_of(repvgg.create_model("resnet18", pretrained=True))
    assert manifest.preprocessing == Preprocessing((3, 224, 224), 235, "bicubic")  # 224 / 0.95
    assert manifest.classes is not None
    assert manifest.classes[0] == "tench"
    manifest = zoo.manifest_of(repvgg.create_model("resnet18", pretrained=True, num_classes=2, in_chans=1))
    assert manifest.preprocessing == Preprocessing((1, 224, 224), 256, mean=(0.5,), std=(0.5,))
    assert manifest.classes is None


def test_every_model_is_made_in_train_mode() -> None:
    for name in ("resnet18", "repvgg_micro"):
        for deploy in (False, True):
            assert all(m.training for m in repvgg.create_model(name, deploy=deploy).modules())


def test_a_name_or_a_file(tmp_path: Path) -> None:
    repvgg.save(member("repvgg_micro", "training"), tmp_path / "model.safetensors")
    assert_same_tensors(open_model(str(tmp_path / "model.safetensors")), member("repvgg_micro", "training"))
    for missing in ("model.pth", "repvgg_a0.safetensors"):
        with pytest.raises(FileError, match="no such file"):
            open_model(str(tmp_path / missing))
    with pytest.raises(ValueError, match="no model 'repvgg_q0'"):
        open_model("repvgg_q0")


# -------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILY)
def test_trap_3_a_deploy_form_loads_what_reparameterize_saved(name: str, form: str, tmp_path: Path) -> None:
    model = member(name, form)
    back = assert_round_trip(model, tmp_path / "model.safetensors")
    assert zoo.manifest_of(back).form == form
    built = zoo.create_model(name, num_classes=7, width=1 / 8, deploy=form == "deploy").eval()
    built.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(built), logits(model))


@pytest.mark.parametrize("name", FAMILY)
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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes_survive(form: str, dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    model = narrow(form=form).to(dtype)
    back = assert_round_trip(model, tmp_path / f"model{suffix}")
    assert {p.dtype for p in back.parameters()} == {dtype}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
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
def test_options_survive(options: dict[str, Any], form: str, suffix: str, tmp_path: Path) -> None:
    model = narrow(form=form, **options)
    back = assert_round_trip(model, tmp_path / f"model{suffix}")
    arch = zoo.manifest_of(back).arch
    assert arch is not None
    defaults = {"output_stride": 32, "small_input": False, "in_chans": 3, "block": "repvgg"}
    wanted = {"name": "repvgg_micro", "num_classes": 7, "width": 1 / 8, **defaults}
    assert arch == {**wanted, **options}


@pytest.mark.parametrize(("name", "form"), [("resnet18", "training"), ("resnet18", "deploy"), ("efficientnet_b0", "deploy")])
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
        model.get_buffer("stem.block.conv_kxk.bn.running_var")[0] = 0
    with pytest.raises(FileError, match=r"not written, stem\.block\.conv_kxk\.bn\.running_var has a zero"):
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


# ------------------------------------------------------------------------------------------------------------- strictness


def rewrite(
    path: Path, change: Callable[[dict[str, Any]], object] = lambda m: m, tensors: Callable[[Tensors], object] = lambda t: t
) -> None:
    """Change the manifest (JSON) or the tensors of a file in place, as an editor of files would."""
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        manifest = json.loads(file.metadata()[METADATA_KEY])
        kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(manifest)
    tensors(kept)
    save_file(kept, path, {METADATA_KEY: json.dumps(manifest)})


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(FileError, match=reason) as caught:
        repvgg.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("head.bias"), r"lacks head\.bias"),
        (lambda t: t.update({"head.extra": torch.zeros(1)}), r"has an unexpected head\.extra"),
        (lambda t: t.update({"head.bias": torch.zeros(6)}), r"has another shape of head\.bias"),
        (lambda t: t.update({"head.bias": torch.zeros(7, dtype=torch.long)}), r"has another type of head\.bias"),
        (lambda t: t.update({"head.bias": torch.zeros(7, dtype=torch.int8)}), r"head\.bias is torch\.int8"),
        (lambda t: t.update({"head.bias": torch.zeros(7, dtype=torch.complex64)}), r"head\.bias is torch\.complex64"),
        (lambda t: t.update({"head.bias": torch.zeros(7).to(torch.float8_e4m3fn)}), r"head\.bias is torch\.float8"),
        (lambda t: t.update({"\x1b[2J\nall is well": torch.zeros(1)}), r"unexpected \[2J all is well"),
        (dict.clear, "lacks"),
    ],
)
def test_every_tensor_finds_its_place(form: str, change: Callable[[Tensors], object], reason: str, tmp_path: Path) -> None:
    repvgg.save(member("repvgg_micro", form), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", tensors=change)
    assert_refused(tmp_path / "model.safetensors", reason)


def test_trap_6_a_file_of_one_form_never_fills_the_other(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for form, other in (("training", "deploy"), ("deploy", "training")):
        model = narrow(form=form)
        repvgg.save(model, path)
        rewrite(path, lambda m: m.update(form=other, layers=None))  # noqa: B023
        assert_refused(path, r"does not fit its architecture: it lacks stages\.0\.0\.block\..* and \d+ more")
        built = zoo.create_model("repvgg_micro", num_classes=7, width=1 / 8, deploy=other == "deploy")
        with pytest.raises(RuntimeError, match="Missing key"):
            built.load_state_dict(model.state_dict())
        mixed = {**model.state_dict(), **built.state_dict()}
        torch.save(mixed, tmp_path / "mixed.pth")
        assert_refused(tmp_path / "mixed.pth", "unexpected stages")


def edit_layer(index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["layers"][index].update(values)


LIES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(format_version=2), "format version 2, this repvgg reads 1: upgrade"),
    (lambda m: m.pop("format_version"), "manifest cannot be used .*lacks 'format_version'"),
    (lambda m: m.update(form="quantum"), "no form 'quantum'"),
    (lambda m: m.update(keys="caffe"), "not a RepVGG checkpoint"),
    (lambda m: m.update(keys="timm"), "it lacks stages"),
    (lambda m: m.update(keys=["timm"]), "keys is of type list"),
    (lambda m: m.update(surprise=1), "manifest cannot be used .*surprise"),
    (lambda m: m.update(arch=5), "arch is of type int"),
    (lambda m: m.update(arch=None, layers=None), "neither an architecture nor layers"),
    (lambda m: m.update(arch=None, layers=[]), "neither an architecture nor layers"),
    (lambda m: m["arch"].update(name="repvgg_a1"), "does not fit its architecture"),
    (lambda m: m["arch"].update(name="repvgg_z9"), "no model 'repvgg_z9'"),
    (lambda m: m["arch"].update(name="resnet18"), "takes no width"),
    (lambda m: m["arch"].update(width=0.25), "has another shape"),
    (lambda m: m["arch"].update(width=1e300), "width is above 0 and at most 16"),
    (lambda m: m["arch"].update(width="wide"), "width|type|not supported"),
    (lambda m: m["arch"].update(num_classes=10**12), "7 class names do not fit 1000000000000 outputs"),
    (lambda m: m.update(classes=None) or m["arch"].update(num_classes=10**12), "another shape of head"),
    (lambda m: m["arch"].update(in_chans=10**12), "does not fit in_chans"),
    (lambda m: m["arch"].update(output_stride=7), "output_stride is 7"),
    (lambda m: m["arch"].update(block="dropout"), "no block 'dropout'"),
    (lambda m: m["arch"].update(block=["repvgg"]), "unhashable"),
    (lambda m: m["arch"].update(pretrained=True), "asks for other weights"),
    (lambda m: m["arch"].update(deploy=True), "deploy"),
    (lambda m: m["arch"].update(device="cuda"), "device"),
    (lambda m: m.update(classes=["a", "b"]), "2 class names do not fit 7 outputs"),
    (lambda m: m.update(classes=[1, 2, 3, 4, 5, 6, 7]), "classes are names"),
    (lambda m: m.update(classes="abcdefg"), "classes is of type str"),
    (lambda m: m.update(training=None), "training is of type NoneType"),
    (lambda m: m.update(preprocessing=None), "manifest cannot be used"),
    (lambda m: m["preprocessing"].update(input_size=[1, 64, 64]), "preprocessing"),
    (lambda m: m["preprocessing"].update(input_size=[3, 64]), "preprocessing"),
    (lambda m: m["preprocessing"].update(input_size=[3, 0, 64]), "between 1 and 8192"),
    (lambda m: m["preprocessing"].update(input_size=[3, 1e9, 64]), "between 1 and 8192"),
    (lambda m: m["preprocessing"].update(resize=10**9), "between 1 and 8192"),
    (lambda m: m["preprocessing"].update(mean=[0, 0, float("nan")]), "preprocessing"),
    (lambda m: m["preprocessing"].update(std=[1, 0, 1]), "std is positive"),
    (lambda m: m["preprocessing"].update(std=[1, 1, float("inf")]), "std is positive"),
    (lambda m: m["preprocessing"].update(interpolation="magic"), "no interpolation 'magic'"),
]
LAYER_LIES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (edit_layer(0, op="exec"), "layer 1 of the list, conv2d, does not fit|no operator 'exec'"),
    (edit_layer(0, activation="gelu"), "no activation 'gelu'"),
    (edit_layer(0, stride=[0, 0]), "a convolution that cannot be"),
    (edit_layer(0, stride=[2]), "shorter"),
    (edit_layer(0, stride=[2**63, 2]), "a convolution that cannot be"),
    (edit_layer(0, stride=[2.5, 2.5]), "a convolution that cannot be"),
    (edit_layer(0, padding=[10**6, 10**6]), "a convolution that cannot be"),
    (edit_layer(0, padding=[-1, -1]), "a convolution that cannot be"),
    (edit_layer(0, padding="same"), "a convolution that cannot be"),
    (edit_layer(0, padding=None), "manifest cannot be used"),
    (edit_layer(0, dilation=[0, 0]), "a convolution that cannot be"),
    (edit_layer(0, dilation=[113, 113]), "a convolution that cannot be"),  # on 224 pixels
    (edit_layer(0, kernel_size=[3, 3, 3]), "longer"),
    (edit_layer(0, kernel_size=[10**9, 10**9]), "a convolution that cannot be"),
    (edit_layer(0, groups=0), "groups"),
    (edit_layer(0, groups=3), "shape|divisible"),
    (edit_layer(0, in_channels=4), "layer 0 of the list, conv2d, does not fit"),
    (edit_layer(0, out_channels=10**12), "layer 1 of the list, conv2d, does not fit"),
    (edit_layer(0, weight=5), "it lacks 5"),
    (edit_layer(0, weight="forward.weight"), "forward"),
    (edit_layer(0, weight="weight"), "it lacks weight.bias"),
    (edit_layer(0, weight="head.weight"), "unexpected stem"),
    (edit_layer(0, weight="stem..weight"), "describes no network"),
    (edit_layer(2, weight="stem.block.weight"), "it has an unexpected stages"),
    (edit_layer(-1, out_features=8), "another shape of head"),
    (lambda m: m["layers"].pop(), "unexpected head"),
    (lambda m: m["layers"].pop(-2), "linear, does not fit"),
    (lambda m: m["layers"].pop(0), "layer 0 of the list, conv2d, does not fit"),
    (lambda m: m["layers"].append("end"), "manifest"),
    (lambda m: m["layers"].append({"op": "squeeze_excite", "channels": 7, "path": "se"}), "squeeze_excite, does not fit"),
    (lambda m: m["layers"].append({"op": "global_avg_pool"}), "global_avg_pool, does not fit"),
    (lambda m: m["layers"][3].pop("stride"), "lacks 'stride'"),
    (lambda m: m.update(layers={"0": m["layers"][0]}), "layers is of type dict"),
]


@pytest.mark.parametrize(("lie", "reason"), LIES)
def test_a_manifest_that_lies(lie: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    repvgg.save(member("repvgg_micro", "training"), path, classes=list("abcdefg"))
    rewrite(path, lie)
    assert_refused(path, reason)


@pytest.mark.parametrize(("lie", "reason"), LAYER_LIES)
def test_a_layer_list_that_lies(lie: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    repvgg.save(member("repvgg_micro", "deploy"), path)
    rewrite(path, lie)
    assert_refused(path, "list of layers is not that of its architecture|layers is of type|manifest cannot be used")
    rewrite(path, lambda m: m.update(arch=None))
    assert_refused(path, reason)


def test_a_comparators_size_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    greedy = {"name": "resnet18", "num_classes": 10**8, "in_chans": 3}  # 200 GB
    checkpoint.write(path, narrow(form="deploy").state_dict(), Manifest(greedy, "deploy"))
    assert_refused(path, "larger network than its tensors")


def test_mixed_dtypes_become_the_widest(tmp_path: Path) -> None:
    model = narrow().half()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    repvgg.save(model, tmp_path / "model.safetensors")
    back = repvgg.load(tmp_path / "model.safetensors")
    assert {t.dtype for t in back.state_dict().values() if t.is_floating_point()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name].double(), tensor.double())
    assert logits(back).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_10_numbers_that_are_none_are_named(scheme: str, suffix: str, value: float, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in state("repvgg_a1", "training", scheme).items()}
    name = [name for name in tensors if name.endswith("weight")][13]
    tensors[name].view(-1)[-1] = value
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)  # type: ignore[operator]
    assert_refused(path, f"{name} holds NaN or Inf")


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-30])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_10_variances_that_are_none_are_named(scheme: str, suffix: str, value: float, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in state("repvgg_a1", "training", scheme).items()}
    name = [name for name in tensors if name.endswith("running_var")][7]
    tensors[name][1] = value
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)  # type: ignore[operator]
    assert_refused(path, f"{name} has a zero or negative variance")


# ------------------------------------------------------------------------------------- checkpoints of other implementations


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))  # those of `logits`


@cache
def their_logits(name: str, form: str) -> Tensor:
    """What timm's network says, in float64: 1e-5 would be lost in the rounding of the narrowest and deepest."""
    with torch.no_grad():
        return copy.deepcopy(timm_net(name, form)).double()(IMAGES.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "timm") for name in NARROW),
        *((name, scheme) for name in ("repvgg_b1g4", "repvgg_d2se") for scheme in ("official", "mmpretrain")),
    ],
)
def test_foreign_checkpoints_give_the_same_logits(name: str, scheme: str, form: str, tmp_path: Path) -> None:
    save_file(state(name, form, scheme), tmp_path / "theirs.safetensors")
    model = repvgg.load(tmp_path / "theirs.safetensors")
    assert zoo.manifest_of(model).form == form
    repvgg.save(model, tmp_path / "back.safetensors", to_keys=scheme)
    back, manifest = checkpoint.read(tmp_path / "back.safetensors")
    assert manifest is not None
    theirs = state(name, form, scheme)
    assert back.keys() == theirs.keys()
    assert all(back[key].dtype == theirs[key].dtype and torch.equal(back[key], theirs[key]) for key in theirs)
    assert_same_tensors(repvgg.load(tmp_path / "back.safetensors"), model)
    model.double()
    allowed = rounding(model, IMAGES.double())
    assert relative_error(logits(model), their_logits(name, form)) <= allowed
    if form == "training":
        folded = reparameterize(model)
        assert relative_error(logits(folded), their_logits(name, form)) <= allowed
        repvgg.save(folded, tmp_path / "folded.safetensors", to_keys="timm")
        net = copy.deepcopy(timm_net(name, "deploy")).double()
        for tensor in net.state_dict().values():
            tensor.zero_()
        net.load_state_dict(checkpoint.read(tmp_path / "folded.safetensors")[0], strict=True)
        with torch.no_grad():
            assert relative_error(net(IMAGES.double()), their_logits(name, form)) <= allowed


@pytest.mark.parametrize(
    ("scheme", "container"),
    [("official", c) for c in CONTAINERS] + [(s, c) for s in ("timm", "mmpretrain") for c in ("bare.safetensors", "nested.ckpt")],
)
@pytest.mark.parametrize("form", FORMS)
def test_foreign_checkpoints_load_by_content(form: str, scheme: str, container: str, tmp_path: Path) -> None:
    CONTAINERS[container](state("repvgg_a1", form, scheme), tmp_path / container)
    model = repvgg.load(tmp_path / container)
    wanted = state("repvgg_a1", form, scheme)
    repvgg.save(model, tmp_path / "back.pth", to_keys=scheme)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert zoo.manifest_of(model).classes is None


def test_old_checkpoints_lack_batch_counters(tmp_path: Path) -> None:
    whole = state("repvgg_a1", "training", "official")
    torch.save({k: t for k, t in whole.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    model = repvgg.load(tmp_path / "old.pth").double()
    assert relative_error(logits(model), their_logits("repvgg_a1", "training")) <= rounding(model, IMAGES.double())


def test_a_thousand_classes_are_imagenets(tmp_path: Path) -> None:
    model = narrow("repvgg_a1", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    manifest = zoo.manifest_of(repvgg.load(tmp_path / "bare.pth"))
    assert manifest.classes is not None
    assert manifest.classes[:2] == ["tench", "goldfish"]
    assert len(manifest.classes) == 1000
    assert manifest.preprocessing == Preprocessing()


@pytest.mark.parametrize("other", ["resnet18", "mobileone_s0"])
def test_checkpoints_of_other_networks_are_refused(other: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model(other, num_classes=2).state_dict(), tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", "not a RepVGG checkpoint")


def test_a_network_of_no_member_is_refused(tmp_path: Path) -> None:
    tensors = state("repvgg_a1", "deploy", "official")
    del tensors["stage2.1.rbr_reparam.weight"]
    torch.save(tensors, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", "no member of the family")


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_every_member_of_timm_at_full_width(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomize(timm.create_model(name, num_classes=1000), (4, 3, 64, 64))
    if name == "repvgg_d2se":  # so deep a net of random gates amplifies rounding a hundred thousandfold; timm's own fold too
        theirs = theirs.double()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    model = repvgg.load(tmp_path / "theirs.safetensors")
    arch = zoo.manifest_of(model).arch
    assert arch is not None
    assert (arch["name"], arch["width"]) == (name, 1)
    x = torch.randn(2, 3, 64, 64).to(next(model.parameters()))
    with torch.no_grad():
        wanted, allowed = theirs(x), rounding(theirs, x)
        assert relative_error(model(x), wanted) <= allowed
        folded = reparameterize(model)
        assert relative_error(folded(x), wanted) <= allowed
        for ours in (model, folded):
            repvgg.save(ours, tmp_path / "back.safetensors", to_keys="timm")
            tensors, _ = checkpoint.read(tmp_path / "back.safetensors")
            if ours is folded:
                theirs = timm.utils.model.reparameterize_model(theirs)
            theirs.load_state_dict(tensors, strict=True)
            assert relative_error(theirs(x), wanted) <= allowed


# --------------------------------------------------------------------------------------------------------------- the hub

COMMIT, PINNED = "1" * 40, "2" * 40
REPO = "timm/repvgg_a0.rvgg_in1k"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """One repository, with two commits of its weights."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = randomize(timm.create_model("repvgg_a0"))
    from safetensors.torch import save

    main = {"model.safetensors": save(net.state_dict(), {"format": "pt"})}
    with torch.no_grad():
        net.head.fc.bias += 1
    pinned = {"model.safetensors": save(net.state_dict(), {"format": "pt"})}
    with serving() as served:
        served.revisions[REPO] = {"main": main, COMMIT: main, PINNED: pinned}
        yield served


def start(arguments: list[str], home: Path, endpoint: str, **env: str) -> "subprocess.Popen[str]":
    """A Python process of its own, because the hub's client reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return subprocess.Popen(
        [sys.executable, *arguments], env=inherited | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


ONLINE = """
import sys, repvgg
out, pinned = sys.argv[1:]
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=True), out + "/main.safetensors")
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=pinned, deploy=True), out + "/pinned.safetensors")
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=True, num_classes=10, output_stride=16), out + "/ten.safetensors")
for name, revision in (("repvgg_a1", True), ("repvgg_a0", "nowhere")):
    try:
        repvgg.create_model(name, pretrained=revision)
    except repvgg.FileError as error:
        print(error)
"""
OFFLINE = """
import sys, repvgg
repvgg.save(repvgg.create_model("repvgg_a0", pretrained=True), sys.argv[1] + "/offline.safetensors")
try:
    repvgg.create_model("repvgg_b0", pretrained=True)
except repvgg.FileError as error:
    print(error)
"""


def test_pretrained_weights_come_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.effect_noise((300, 260), 90).convert("RGB").save(image)
    predict = ["-m", "repvgg", "predict"]
    online = start(["-c", ONLINE, str(tmp_path), PINNED], tmp_path / "home", hub.url)
    command = start([*predict, "repvgg_a0", str(image), "--json"], tmp_path / "other_home", hub.url)
    nobody = start([*predict, "repvgg_b0", str(image)], tmp_path / "third_home", "http://127.0.0.1:9")
    (out, err), (labels, command_err), (nothing, nobody_err) = (p.communicate(timeout=300) for p in (online, command, nobody))

    assert online.returncode == 0, err
    no_repo, no_revision = out.splitlines()
    assert re.match(
        r"timm/repvgg_a1.rvgg_in1k@main is not in the local cache and cannot be fetched: .*no such repository.*\(401", no_repo
    )
    assert re.match(r"timm/repvgg_a0.rvgg_in1k@nowhere is not in the local cache and cannot be fetched: .*\(404", no_revision)
    for file, commit, form in (("main", COMMIT, "training"), ("pinned", PINNED, "deploy")):
        (tmp_path / "served.safetensors").write_bytes(hub.revisions[REPO][commit]["model.safetensors"])
        wanted = repvgg.load(tmp_path / "served.safetensors")
        model = repvgg.load(tmp_path / f"{file}.safetensors")
        assert_same_tensors(model, reparameterize(wanted) if form == "deploy" else wanted)
        manifest = zoo.manifest_of(model)
        assert manifest.form == form
        assert manifest.classes is not None
        assert (manifest.classes[0], manifest.classes[999]) == ("tench", "toilet tissue")
        assert manifest.preprocessing == Preprocessing()
        assert manifest.training["source"] == REPO
    ten = repvgg.load(tmp_path / "ten.safetensors")
    main = repvgg.load(tmp_path / "main.safetensors").state_dict()
    assert zoo.manifest_of(ten).classes is None
    assert asdict(zoo.manifest_of(ten))["arch"]["output_stride"] == 16
    assert ten.state_dict()["head.weight"].shape == (10, 1280)
    assert all(torch.equal(t, main[n]) for n, t in ten.state_dict().items() if not n.startswith("head."))
    fetched = sorted(asked for asked in hub.asked if asked.startswith("GET"))
    assert fetched == [f"GET /{REPO}/resolve/{revision}/model.safetensors" for revision in (PINNED, "main", "main")]  # by two homes

    assert command.returncode == 0, command_err
    from repvgg.predict.labels import predict as run

    (prediction,) = run(reparameterize(repvgg.load(tmp_path / "main.safetensors")), [str(image)])
    said = json.loads(labels)["labels"]
    assert said[0]["label"] == prediction.labels[0][0]
    assert said[0]["probability"] == pytest.approx(prediction.labels[0][1], abs=1e-4)

    assert nobody.returncode == 2
    assert nothing == ""
    assert nobody_err == (
        "repvgg: timm/repvgg_b0.rvgg_in1k@main is not in the local cache and cannot be fetched: check the connection and "
        "HF_HUB_OFFLINE ([Errno 111] Connection refused)\n"
    )

    before = len(hub.asked)
    offline = start(["-c", OFFLINE, str(tmp_path)], tmp_path / "home", hub.url, HF_HUB_OFFLINE="1")
    out, err = offline.communicate(timeout=300)
    assert offline.returncode == 0, err
    assert out.startswith("timm/repvgg_b0.rvgg_in1k@main is not in the local cache")
    assert len(hub.asked) == before
    assert_same_tensors(repvgg.load(tmp_path / "offline.safetensors"), repvgg.load(tmp_path / "main.safetensors"))


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(pretrained, "pretrained_file", lambda *_: path)
    path.write_bytes(b"<html>please log in</html>")
    with pytest.raises(FileError, match="not a model file"):
        repvgg.create_model("repvgg_a0", pretrained=True)
    save_file(state("repvgg_a1", "training"), path)
    with pytest.raises(FileError, match=f"{path}: does not fit its architecture"):
        repvgg.create_model("repvgg_a0", pretrained=True, num_classes=7)
