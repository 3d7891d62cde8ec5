"""in_timm.py, and what timm promises of a network, against timm's own RepVGG-A0 with the same weights."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from rounding import rounding
from torch import Tensor, nn

import repvgg
from repvgg.models import keys

timm = pytest.importorskip("timm")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.fixture(scope="module")
def ours() -> Any:
    torch.manual_seed(0)
    return randomize(repvgg.create_model("repvgg_a0", num_classes=7))


@pytest.fixture(scope="module")
def theirs(ours: nn.Module) -> Any:
    model = timm.create_model("repvgg_a0", num_classes=7).eval()
    model.load_state_dict(keys.to_foreign(ours.state_dict(), "timm"))
    return model


@pytest.fixture(scope="module")
def allowed(ours: nn.Module) -> float:
    return 10 * rounding(ours, X)


def close(a: Any, b: Any, allowed: float) -> bool:
    """Say whether two trees of tensors are equal but for rounding, in the same places."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and relative_error(a, b) <= allowed
    return type(a) is type(b) and len(a) == len(b) and all(close(x, y, allowed) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [3, 1], "stop_early": True},
        {"indices": (-2, 0), "intermediates_only": True},
        {"indices": [2], "norm": True, "stop_early": True, "output_fmt": "NCHW"},
    ],
)
def test_forward_intermediates(options: dict[str, Any], ours: Any, theirs: Any, allowed: float) -> None:
    with torch.no_grad():
        assert close(ours.forward_intermediates(X, **options), theirs.forward_intermediates(X, **options), allowed)
    wrongs: list[dict[str, Any]] = [{"indices": [5]}, {"indices": 0}, {"indices": []}, {"indices": 6}, {"output_fmt": "NLC"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"indices|stages|NCHW"):
            ours.forward_intermediates(X, **wrong)


def test_head_and_classifier(ours: Any, theirs: Any, allowed: float) -> None:
    with torch.no_grad():
        for pre_logits in (False, True):
            features = ours.forward_features(X)
            assert close(ours.forward_head(features, pre_logits=pre_logits), theirs.forward_head(features, pre_logits), allowed)
    assert torch.equal(ours.get_classifier().weight, theirs.get_classifier().weight)
    assert [{k: f[k] for k in ("num_chs", "reduction", "stage")} for f in ours.feature_info] == [
        {k: f[k] for k in ("num_chs", "reduction", "stage")} for f in theirs.feature_info
    ]
    assert (ours.num_classes, ours.num_features, ours.head_hidden_size) == (7, theirs.num_features, theirs.head_hidden_size)
    promised = inspect.signature(timm.models.ByobNet.forward_intermediates).parameters.keys() - {"self", "exclude_final_conv"}
    assert promised <= inspect.signature(ours.forward_intermediates).parameters.keys()


@pytest.mark.parametrize(
    ("num_classes", "global_pool"), [(0, None), (0, ""), (3, None), pytest.param(3, "avg", marks=pytest.mark.slow)]
)
def test_reset_classifier_and_no_classifier(num_classes: int, global_pool: str | None, tmp_path: Path) -> None:
    mine: Any = repvgg.create_model("repvgg_a0", width=0.25).eval()
    other = timm.create_model("repvgg_a0", width_factor=0.25).eval()
    for model in (mine, other):
        model.reset_classifier(num_classes, global_pool)
    with torch.no_grad():
        wanted = other(X).shape
        assert mine(X).shape == wanted
        repvgg.save(mine, tmp_path / "a.safetensors")
        assert torch.equal(repvgg.load(tmp_path / "a.safetensors")(X), mine(X))
        deploy = repvgg.reparameterize(mine)
        repvgg.save(deploy, tmp_path / "b.safetensors")
        assert torch.equal(repvgg.load(tmp_path / "b.safetensors")(X), deploy(X))
    pool = {} if global_pool is None else {"global_pool": global_pool}
    made = repvgg.create_model("repvgg_a0", width=0.25, num_classes=num_classes, **pool)  # type: ignore[arg-type]
    assert made.eval()(X).shape == wanted


def test_a_pool_that_is_not_there_is_refused() -> None:
    for options, words in (({"global_pool": "max"}, "'avg', or ''"), ({"global_pool": ""}, "goes with num_classes=0")):
        with pytest.raises(ValueError, match=words):
            repvgg.create_model("repvgg_a0", width=0.25, **options)  # type: ignore[arg-type]


def test_drop_rate_is_of_training_alone() -> None:
    model = repvgg.create_model("repvgg_micro", width=0.25, drop_rate=0.9)
    torch.manual_seed(0)
    assert not torch.equal(model.forward_head(torch.ones(2, 64, 1, 1)), model.forward_head(torch.ones(2, 64, 1, 1)))  # type: ignore[operator]
    model.eval()
    assert torch.equal(model(X), model(X))


def test_features_only(ours: Any) -> None:
    mine = repvgg.create_model("repvgg_a0", width=0.25, features_only=True, out_indices=(1, 3)).eval()
    assert mine.feature_info.channels() == [12, 48]  # type: ignore[union-attr, operator]
    assert [f.shape[1] for f in mine(X)] == [12, 48]
    with pytest.raises(ValueError, match="take it from timm"):
        repvgg.create_model("resnet18", features_only=True)


# ------------------------------------------------------------------------------------------------------------ the registry


def test_registered_twice_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = repvgg.register_with_timm(), repvgg.register_with_timm()
    assert first == second
    assert set(first) <= set(timm.list_models("rep_*"))
    assert "rep_repvgg_b3g2" in first


def test_made_by_timm_with_its_own_weights(theirs: Any, tmp_path: Path) -> None:
    """Those of a file, as timm reads them of the hub: with fewer channels, and another classifier."""
    repvgg.register_with_timm()
    torch.save(theirs.state_dict(), tmp_path / "a0.pth")
    overlay = {"file": str(tmp_path / "a0.pth"), "num_classes": 7}
    mine = timm.create_model("rep_repvgg_a0", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        assert close(mine(X), theirs(X), 10 * rounding(mine, X))
    grey = timm.create_model("rep_repvgg_a0", pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    assert grey(X[:, :1]).shape == (2, 3)
    mine = mine.get_submodule("stages.1.0.block.conv_kxk.conv").weight
    assert torch.equal(grey.get_submodule("stages.1.0.block.conv_kxk.conv").weight, mine)
    assert timm.get_pretrained_cfg("rep_repvgg_a0").hf_hub_id == "timm/repvgg_a0.rvgg_in1k"
    assert timm.get_pretrained_cfg("rep_repvgg_b1g2").hf_hub_id is None


def test_timms_own_reparam_folds_our_blocks(ours: Any) -> None:
    folded = timm.utils.reparameterize_model(ours)
    assert norms(folded) == 0
    wanted = repvgg.reparameterize(ours).state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in folded.state_dict().items())
    with pytest.raises(repvgg.ReparamError, match="train mode"):
        timm.utils.reparameterize_model(repvgg.create_model("repvgg_micro", width=0.25))


@pytest.mark.parametrize("name", ["rep_repvgg_a0", "resnet18", pytest.param("repvgg_a0", marks=pytest.mark.slow)])
def test_extractors_of_timm_fold(name: str) -> None:
    repvgg.register_with_timm()
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, features_only=True))
    deploy = repvgg.reparameterize(model, X)
    assert (norms(deploy), dict(deploy.fold_report.left)) == (0, {})  # type: ignore[union-attr, arg-type]
    assert [m.shape for m in deploy(X)] == [m.shape for m in model(X)]


def test_torchvisions_feature_pyramid() -> None:
    utils = pytest.importorskip("torchvision.models.detection.backbone_utils")
    repvgg.register_with_timm()
    body = timm.create_model("rep_repvgg_micro", features_only=True)
    info = body.feature_info
    layers = {f"stages_{i}": str(i) for i in range(4)}
    model = randomize(utils.BackboneWithFPN(body, layers, info.channels()[1:], 16))
    with torch.no_grad():
        wanted = model(X)
        assert [tuple(m.shape[1:]) for m in wanted.values()] == [(16, 64 // r, 64 // r) for r in (*info.reduction()[1:], 64)]
        deploy = repvgg.reparameterize(model, X)
        assert norms(deploy) == 0
        assert deploy(X).keys() == wanted.keys()


def test_segmentation_models_take_it_as_their_encoder() -> None:
    """segmentation_models_pytorch is no dependency of ours: this is run where somebody has it."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    repvgg.register_with_timm()
    torch.manual_seed(0)
    model = randomize(smp.Unet("tu-rep_repvgg_micro", encoder_weights=None, classes=3))
    deploy = repvgg.reparameterize(model, X)
    assert norms(deploy.encoder) == 0  # type: ignore[arg-type]
    with torch.no_grad():
        assert deploy(X).shape == (2, 3, 64, 64)
        assert relative_error(deploy(X), model(X)) <= rounding(model, X)
