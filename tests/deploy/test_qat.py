"""qat.py: training rounds as an INT8 file does, and nothing of it stays behind."""

import pytest
import torch
from conftest import randomize, relative_error
from hypothesis import given
from hypothesis import strategies as st
from rounding import rounding
from torch import Tensor, nn

from repvgg.deploy.qat import RoundedConv, round_convolutions, rounded, rounded_weight
from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import as_conv, as_linear
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo


@given(st.floats(-5, 5), st.floats(0.01, 100), st.integers(0, 1000))
def test_images_have_256_levels_with_zero_among_them(shift: float, scale: float, seed: int) -> None:
    x = (torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    step = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    got = rounded(x)
    levels = got.double() / step
    assert float((levels - levels.round()).abs().max()) < 1e-3  # whole multiples, so zero is one
    assert got.unique().numel() <= 256
    assert float((got - x).abs().max()) <= 1.01 * step  # half a step, and as much where zero was moved onto a level


def test_weights_have_255_levels_for_each_output_channel() -> None:
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-3, 3, 6).view(-1, 1, 1, 1)
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    assert relative_error(rounded_weight(weight), (weight / step).round() * step) <= 2 * torch.finfo(weight.dtype).eps
    assert torch.equal(rounded_weight(torch.zeros(2, 2, 3, 3)), torch.zeros(2, 2, 3, 3))


def test_gradients_pass_the_rounding() -> None:
    conv = RoundedConv(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    y = torch.randn(2, 4, 8, 8)
    conv(x).backward(y)
    again = x.detach().requires_grad_()
    plain(again).backward(y)
    for got, wanted in ((x.grad, again.grad), (conv.weight.grad, plain.weight.grad)):
        assert got is not None
        assert wanted is not None
        assert relative_error(got, wanted) < 0.05


def test_rounding_before_the_batch_norm_is_rounding_after_the_fold() -> None:
    """So what is trained is what an INT8 file will compute."""
    pair = randomize(nn.Sequential(RoundedConv(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), (8, 3, 8, 8))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), pair[1]).eval()
    plain[0].load_state_dict(pair[0].state_dict())
    folded = as_conv(as_linear(plain), like=pair[0].weight)  # type: ignore[arg-type]
    x = torch.randn(4, 3, 8, 8)
    wanted = nn.functional.conv2d(rounded(x), rounded_weight(folded.weight), folded.bias, padding=1)
    assert relative_error(pair(x), wanted) <= rounding(plain, x)


def network() -> nn.Module:
    return randomize(zoo.create_model("repvgg_micro", num_classes=5, width=0.25, small_input=True, block="plain"), (16, 3, 16, 16))


def test_a_network_rounds_everywhere_and_its_state_and_manifest_stay() -> None:
    model, x = network(), torch.randn(4, 3, 16, 16)
    before, names = model(x), list(model.state_dict())
    parameters = list(model.parameters())
    round_convolutions(model)
    assert sum(type(m) is RoundedConv for m in model.modules()) == 10
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert 1e-4 < relative_error(model(x), before) < 0.1
    assert zoo.manifest_of(model) == zoo.manifest_of(network())


def test_training_learns_to_live_with_the_rounding() -> None:
    model, x = network(), torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        wanted: Tensor = model(x)
    round_convolutions(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_blocks_with_branches_are_refused() -> None:
    model = zoo.create_model("repvgg_micro", width=0.25)
    with pytest.raises(ReparamError, match="stem: has other branches than one convolution with batch norm: fold the model"):
        round_convolutions(model)
    with pytest.raises(ReparamError, match="fold the model, then insert_bn"):
        round_convolutions(reparameterize(model.eval()))
