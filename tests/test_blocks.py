"""blocks.py: what the blocks are made of, and that both forms agree in every geometry."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from torch import Tensor, nn

from repvgg.algebra import PaddingMode
from repvgg.blocks import BLOCKS, Conv1x1, SqueezeExcite, deploy_conv, repvgg, with_bn
from repvgg.reparam import reparameterize


def test_the_block_is_equation_1() -> None:
    """bn(W3 * x) + bn(W1 * x) + bn(x), each with statistics of its own, written out with torch's functions."""
    block = randomize(repvgg(4, 4).double(), (8, 4, 6, 6))
    state = block.state_dict()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def bn(y: Tensor, name: str) -> Tensor:
        mean, var, gamma, beta = (state[f"{name}.{key}"].view(4, 1, 1) for key in ("running_mean", "running_var", "weight", "bias"))
        out: Tensor = (y - mean) * gamma / torch.sqrt(var + 1e-5) + beta
        return out

    wanted = bn(F.conv2d(x, state["conv_kxk.conv.weight"], padding=1), "conv_kxk.bn")
    wanted = wanted + bn(F.conv2d(x, state["conv_1x1.conv.weight"]), "conv_1x1.bn") + bn(x, "identity")
    assert relative_error(block(x), wanted) <= 1e-14


@pytest.mark.parametrize(
    ("into", "out", "stride", "names"),
    [
        (4, 4, 1, ["conv_kxk", "conv_1x1", "identity"]),
        (4, 4, 2, ["conv_kxk", "conv_1x1"]),
        (4, 8, 1, ["conv_kxk", "conv_1x1"]),
    ],
)
def test_identity_only_where_input_and_output_have_one_shape(into: int, out: int, stride: int, names: list[str]) -> None:
    assert [name for name, _ in repvgg(into, out, stride).named_children()] == names
    convs = [m for m in repvgg(into, out, stride).modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs)


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ("repvgg", ["conv_kxk", "conv_1x1", "identity"]),
        ("plain", ["conv_kxk"]),
        ("no_identity", ["conv_kxk", "conv_1x1"]),
        ("no_1x1", ["conv_kxk", "identity"]),
    ],
)
def test_the_variants_of_table_6(block: str, names: list[str]) -> None:
    m = BLOCKS[block](4, 4)
    assert [name for name, _ in m.named_children()] == names
    m = randomize(m.double(), (8, 4, 6, 6))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert relative_error(reparameterize(m)(x), m(x)) <= 1e-12


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_trap_02_both_forms_honour_dilation_and_padding_mode(stride: int, dilation: int, mode: PaddingMode) -> None:
    """And the folded form is, to the letter, the deploy form that is built directly."""
    geometry = (6, 6, stride, dilation, 2, mode)
    block = randomize(repvgg(*geometry).double(), (8, 6, 9, 9))
    folded, direct = reparameterize(block), deploy_conv(*geometry).double()
    assert repr(folded) == repr(direct)
    direct.load_state_dict(folded.state_dict())
    x = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    wanted = block(x)
    assert wanted.shape[2:] == (9, 10) if stride == 1 else (5, 5)
    assert relative_error(folded(x), wanted) <= 1e-12
    assert torch.equal(direct(x), folded(x))
    kernel = block.state_dict()["conv_kxk.conv.weight"]  # the training form itself, against torch's functions
    padded = F.pad(x, [dilation] * 4, mode="constant" if mode == "zeros" else mode)
    conv = block.get_submodule("conv_kxk.conv")
    assert relative_error(conv(x), F.conv2d(padded, kernel, None, stride, 0, dilation, 2)) <= 1e-12


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (8, 5), (1, 1)])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 3), (3, 3)])
def test_trap_11_conv1x1_is_a_convolution(
    stride: int, groups: int, size: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Outputs and all gradients equal those of nn.Conv2d."""
    ours = Conv1x1(3, 6, stride, groups).to(dtype)
    theirs = nn.Conv2d(3, 6, 1, stride, groups=groups, bias=False).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *size, dtype=dtype)
    gradients = []
    for conv in (ours, theirs):
        image = x.clone(memory_format=torch.contiguous_format if conv is theirs else memory_format).requires_grad_()
        out = conv(image)
        (out * torch.arange(out.numel()).view(out.shape).to(dtype)).sum().backward()
        gradients.append((out, image.grad, conv.weight.grad))
    for got, wanted in zip(*gradients, strict=True):
        assert got is not None
        assert wanted is not None
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= 100 * torch.finfo(dtype).eps


TRAINING_STEP = """
import torch
from repvgg.models import FAMILY, RepVGG

torch.manual_seed(0)
for model in (RepVGG(FAMILY["repvgg_micro"], 10, width=0.25), RepVGG(FAMILY["repvgg_a0"]).stem):
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    for _ in range(2):
        model(images).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
print("trained")
"""


def test_trap_11_training_in_channels_last_does_not_crash() -> None:
    """The stem at 224 px, in a process of its own: with nn.Conv2d in place of Conv1x1 it dies of a corrupted heap."""
    command, environment = [sys.executable, "-c", TRAINING_STEP], {**os.environ, "OMP_NUM_THREADS": "1"}
    step = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (step.returncode, step.stdout) == (0, "trained\n"), step.stderr


def test_squeeze_excite_rescales_channels() -> None:
    se = SqueezeExcite(32).double()
    assert [tuple(p.shape) for p in se.parameters()] == [(2, 32, 1, 1), (2,), (32, 2, 1, 1), (32,)]
    x = torch.randn(2, 32, 5, 4, dtype=torch.float64)
    w1, b1, w2, b2 = (p.squeeze() for p in se.parameters())
    wanted = x * torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2).view(2, 32, 1, 1)
    assert relative_error(se(x), wanted) <= 1e-14
    assert SqueezeExcite(4).reduce.out_channels == 1


def test_with_bn_names_its_parts() -> None:
    assert list(with_bn(nn.Conv2d(3, 4, 3, bias=False)).state_dict()) == [
        "conv.weight",
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
