"""baselines.py against the paper's printed numbers, and every one of them folded."""

import math
import sys
from typing import Any

import pytest
import torch
from conftest import error_of_deviation, randomize, relative_error
from rounding import rounding
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import cost
from repvgg.models.baselines import create_baseline
from repvgg.models.names import BASELINES, FAMILY
from repvgg.paper.numbers import FRAGMENTS, HEADLINES, MULS_BY_RULE, TABLE1, TABLE4, TABLE5, Headline, ModelSpeed

timm = pytest.importorskip("timm")

ROWS = {row.model: row for row in (*TABLE4, *TABLE5)}
ROWS["vgg16"] = ROWS["vgg16_bn"]  # without its batch norms there is as much to do


# Each is of the same blocks as a smaller one here; VGG-16 is slow for its classifier, and its pairs are those of every network.
SLOW = {
    "vgg16",
    "vgg16_bn",
    "resnet34",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "regnetx_120",
    "efficientnet_b3",
}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in BASELINES]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Any]:
    """Name, training form with random batch norms, and its folded form, in float64."""
    model = randomize(create_baseline(request.param), (4, 3, 64, 64)).double()
    return request.param, model, reparameterize(model)


def test_trap_9_every_batch_norm_of_every_baseline_folds(pair: tuple[str, nn.Module, Any]) -> None:
    name, model, folded = pair
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert (norms == 0) == (name == "vgg16")  # the first VGG-16 has none
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert not folded.fold_report.left
    modules = dict(model.named_modules())
    folded_in = [name for names in folded.fold_report.stretches.values() for name in names]
    assert sum(isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm) for name in folded_in) == norms
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = model(x), folded(x)
    assert relative_error(got, wanted) <= rounding(model, x)
    assert error_of_deviation(got, wanted) <= rounding(model, x, error=error_of_deviation)


def test_tables_4_and_5(pair: tuple[str, nn.Module, Any]) -> None:
    name, _, folded = pair
    row, c = ROWS[name], cost(folded, (3, BASELINES[name].input_size, BASELINES[name].input_size))
    rounding = round if name == "efficientnet_b3" else math.floor
    assert rounding(c.params / 1e4) / 100 == row.params_m
    assert round(c.macs / 1e9, 1) == row.flops_b
    if name in MULS_BY_RULE:
        assert round(c.winograd_muls / 1e9, 2) == MULS_BY_RULE[name]
    elif row.muls_b is not None:
        assert round(c.winograd_muls / 1e9, 1) == row.muls_b


def test_macs_agree_with_the_flop_counter(pair: tuple[str, nn.Module, Any]) -> None:
    name, model, folded = pair
    size = (3, BASELINES[name].input_size, BASELINES[name].input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        create_baseline(name).eval()(torch.empty(1, *size))
    assert 2 * cost(folded, size).macs == 2 * cost(model, size).macs == counter.get_total_flops()


def test_folding_leaves_convolutions_alone(pair: tuple[str, nn.Module, Any]) -> None:
    name, model, folded = pair
    before, after = cost(model, (3, 64, 64)), cost(folded, (3, 64, 64))
    assert after.fragments == before.fragments
    assert (after.bytes_moved < before.bytes_moved) == (name != "vgg16")


def test_v1_has_the_stride_on_the_1x1() -> None:
    with torch.device("meta"):
        ours, theirs = create_baseline("resnet50"), timm.create_model("resnet50")
        x = torch.empty(1, 3, 224, 224)
    for stage in (2, 3, 4):
        first: Any = ours.get_submodule(f"layer{stage}.0")
        other: Any = theirs.get_submodule(f"layer{stage}.0")
        assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1)) == (other.conv2.stride, other.conv1.stride)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [f.shape for f in ours.forward_intermediates(x, intermediates_only=True)] == [  # type: ignore[operator]
        f.shape for f in theirs.forward_intermediates(x, intermediates_only=True)
    ]


def test_fragmented_operators_of_resnet_blocks() -> None:
    with torch.device("meta"):
        counts = [
            sum(layer.fragment for layer in cost(create_baseline(name)).inside("layer1.1")) for name in ("resnet18", "resnet50")
        ]
    assert tuple(counts) == FRAGMENTS["ResNet"]


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_v1_has_no_pretrained_weights(name: str) -> None:
    with pytest.raises(ValueError, match="the paper's v1, with the stride on the 1x1 convolution") as error:
        create_baseline(name, pretrained=True)
    assert f"timm.create_model({name!r}, pretrained=True)" in str(error.value)


def test_classes_and_channels() -> None:
    for name in ("resnet50", "vgg16", "efficientnet_b0"):
        with torch.device("meta"):
            model = create_baseline(name, num_classes=7, in_chans=1)
        assert model.training
        assert model.eval()(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 7)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no baseline 'resnet19': there are resnet18, resnet34"):
        create_baseline("resnet19")


def test_timm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install timm"):
        create_baseline("resnet18")


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(ValueError, match="timm cannot make resnet18: ") as error:
        create_baseline("resnet18", pretrained=True)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ the paper's numbers


def test_every_row_is_a_model_of_ours() -> None:
    assert set(ROWS) <= {*FAMILY, *BASELINES}
    assert set(BASELINES) <= set(ROWS)
    assert len(TABLE4) == 19
    assert len(TABLE5) == 5


@pytest.mark.parametrize("headline", HEADLINES, ids=lambda h: f"{h.fast}-{h.slow}")
def test_headlines_follow_from_the_printed_speeds(headline: Headline) -> None:
    fast, slow = ROWS[headline.fast], ROWS[headline.slow]
    assert math.floor(100 * fast.speed / slow.speed) / 100 == headline.ratio


@pytest.mark.parametrize("table", [TABLE4, TABLE5], ids=["table4", "table5"])
def test_tables_are_sorted_by_speed(table: tuple[ModelSpeed, ...]) -> None:
    assert [row.speed for row in table] == sorted((row.speed for row in table), reverse=True)


def test_table_1_tflops_count_a_multiply_add_twice() -> None:
    for row in TABLE1:
        if row.kernel_size != 5:  # that row disagrees with itself
            assert 2 * row.gflops / row.milliseconds == pytest.approx(row.tflops, abs=0.02)
