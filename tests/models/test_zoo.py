"""zoo.py: models by name, and the options that they take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from members import assert_same_tensors, member

import repvgg
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import baselines, pretrained, zoo
from repvgg.models.load import open_model
from repvgg.models.manifest import Preprocessing
from repvgg.models.names import resolve_name
from repvgg.models.repvgg import RepVGG


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
        ({"num_classes": -1}, "num_classes"),
        ({"in_chans": 0}, "in_chans"),
        ({"width": 0.0}, "width"),
        ({"width": float("nan")}, "width"),
        ({"output_stride": 4}, "output_stride"),
        ({"block": "nonsense"}, "no block 'nonsense'"),
        ({"pretrained": True, "width": 0.5}, "pretrained"),
        ({"pretrained": True, "in_chans": 1}, "pretrained"),
        ({"pretrained": True, "num_classes": -1}, "num_classes"),
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
    with pytest.raises(ValueError, match=r"timm publishes no weights of repvgg_b1g2: name a file of the authors' own"):
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
