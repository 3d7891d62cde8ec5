"""load.py: files that do not say the truth, or not the whole, are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import FORMS, SCHEMES, state
from members import Tensors, assert_refused, logits, member, narrow
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import repvgg
from repvgg.models import checkpoint, zoo
from repvgg.models.checkpoint import METADATA_KEY
from repvgg.models.manifest import Manifest


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
    (edit_layer(0, weight="head.weight"), "names head.weight twice"),
    (edit_layer(0, weight="stem..weight"), "describes no network"),
    (edit_layer(2, weight="stem.block.weight"), "names stem.block.weight twice"),
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
    got = back.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(got[name].double(), tensor.double())
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


@pytest.mark.parametrize("value", [-1.0, -1e-30])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_trap_10_variances_that_are_none_are_named(scheme: str, suffix: str, value: float, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in state("repvgg_a1", "training", scheme).items()}
    name = [name for name in tensors if name.endswith("running_var")][7]
    tensors[name][1] = value
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)  # type: ignore[operator]
    assert_refused(path, f"{name} has a negative variance")
