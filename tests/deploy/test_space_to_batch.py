"""deploy/space_to_batch.py: the same numbers as the dilated convolution, whatever the size, the dilation and the neighbours."""

from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from hypothesis import given
from hypothesis import strategies as st
from rounding import rounding
from torch import nn

import repvgg
from repvgg.deploy.engines import Options, build
from repvgg.deploy.space_to_batch import SpaceToBatch, space_to_batch, to_batch, to_space
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.repvgg import Layer


def dilated(channels: int, dilation: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, **options)


@given(
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(1, 23),
    st.integers(1, 23),
    st.sampled_from([1, 2]),
    st.sampled_from([3, 5]),
    st.booleans(),
)
def test_the_same_numbers(d: int, depth: int, height: int, width: int, groups: int, kernel: int, channels_last: bool) -> None:
    layers = nn.Sequential(*(Layer(dilated(4, d, kernel, groups=groups), nn.Identity()) for _ in range(depth))).double().eval()
    fast = space_to_batch(layers)
    assert [type(m) for m in fast.children()] == [SpaceToBatch]  # there and back once
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(fast(x) + 1, layers(x) + 1) <= rounding(lambda x: layers(x) + 1, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_there_and_back(memory_format: torch.memory_format) -> None:
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float().contiguous(memory_format=memory_format)
    batched = to_batch(x, 4)
    assert batched.shape == (32, 3, 2, 3)
    assert batched.is_contiguous(memory_format=memory_format)
    assert torch.equal(batched[16 + 4 * 1 + 2], x[1, :, 1::4, 2::4])
    back = to_space(batched, 4)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "name", ["pspnet_repvgg_a0", "pspnet_repvgg_micro_fast", "repvgg_b1g2", pytest.param("pspnet_resnet18", marks=pytest.mark.slow)]
)
def test_whole_networks(name: str) -> None:
    options: dict[str, Any] = {} if "resnet" in name else {"width": 0.125}
    if "resnet" in name:
        pytest.importorskip("timm")
    if not name.startswith("pspnet"):
        options["output_stride"] = 8
    deploy = reparameterize(randomize(repvgg.create_model(name, num_classes=5, **options), (4, 3, 33, 33))).double()
    fast = space_to_batch(deploy)
    stays = sum(isinstance(m, SpaceToBatch) for m in fast.modules())
    assert stays == (7 if "resnet" in name else 2)  # BasicBlocks have an addition between; our stages go once each
    assert not any(isinstance(m, nn.Conv2d) and max(m.dilation) > 1 for m in fast.modules())
    for size in ((65, 65), (50, 37)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(fast(x), deploy(x)) <= rounding(deploy, x)
    assert any(isinstance(m, nn.Conv2d) and max(m.dilation) > 1 for m in deploy.modules())  # it was not changed


def test_what_is_left_alone() -> None:
    """Other strides, paddings and padding modes, unequal dilations."""
    keep = [
        nn.Conv2d(4, 4, 3, 2, 2, 2),
        nn.Conv2d(4, 4, 3, 1, 1, 2),
        nn.Conv2d(4, 4, 3, 1, 2, 2, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, 1, (2, 3), (2, 3)),
        nn.Conv2d(4, 4, 3, 1, 1),
    ]
    for conv in keep:
        with pytest.raises(ValueError, match="Sequential has no dilated convolution to run by space-to-batch"):
            space_to_batch(nn.Sequential(conv))
    mixed = nn.Sequential(dilated(4, 2), dilated(4, 4), nn.ReLU(), dilated(4, 4), dilated(4, 4))
    assert [type(m).__name__ for m in space_to_batch(mixed)] == ["SpaceToBatch", "SpaceToBatch", "ReLU", "SpaceToBatch"]  # type: ignore[attr-defined]


def test_the_training_form_too() -> None:
    model = randomize(repvgg.create_model("pspnet_repvgg_micro", width=0.125, num_classes=3)).double()
    x = torch.randn(1, 3, 50, 37, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(space_to_batch(model)(x), model(x)) <= rounding(model, x)


def test_it_is_for_running_not_for_saving(tmp_path: Any) -> None:
    deploy = reparameterize(repvgg.create_model("pspnet_repvgg_micro", width=0.125, num_classes=3).eval())
    with pytest.raises(ValueError, match=r"was not made by repvgg.create_model"):
        repvgg.save(space_to_batch(deploy), tmp_path / "a.safetensors")


@pytest.mark.parametrize("engine", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_it_can_be_exported(engine: str) -> None:
    pytest.importorskip(engine)
    layers = nn.Sequential(dilated(4, 2), dilated(4, 2)).eval()
    x = torch.randn(2, 4, 9, 14)
    got = build(engine, space_to_batch(layers), Options(input_size=(4, 9, 14), batch_size=2))(x)
    with torch.no_grad():
        assert relative_error(got, layers(x)) <= rounding(layers, x)
