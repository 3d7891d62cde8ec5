"""blocks.py: what the blocks are made of, and that both forms agree in every geometry."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from forks import Forks
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.algebra import PaddingMode, ReparamError
from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import (
    BLOCKS,
    UNFOLDABLE,
    Conv1x1,
    DiracConv,
    Geometry,
    IdentityPlusConv,
    SqueezeExcite,
    block,
    dbb,
    deploy_conv,
    find_block,
    repvgg,
    with_bn,
)
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY, Member
from repvgg.models.repvgg import RepVGG


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
    assert relative_error(block(x), wanted) <= rounding(block, x)


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
        ("identity_no_bn", ["conv_kxk", "conv_1x1", "identity"]),
        ("post_bn", ["sum", "bn"]),
        ("relu_in_branch", ["conv_kxk", "conv_1x1", "identity"]),
        ("dirac", ["conv_kxk"]),
        ("trivial", ["conv_kxk"]),
        ("acb", ["conv_kxk", "conv_1x3", "conv_3x1"]),
        ("dbb", ["conv_kxk", "conv_1x1", "conv_1x1_kxk", "average"]),
        ("mobileone", ["conv_kxk", "conv_1x1", "identity", "conv_kxk_2", "conv_kxk_3", "conv_kxk_4"]),
        ("qarepvgg", ["sum", "bn"]),
    ],
)
def test_what_blocks_are_made_of(block: str, names: list[str]) -> None:
    assert [name for name, _ in BLOCKS[block](4, 4).named_children()] == names


def test_every_block_is_in_the_list_above() -> None:
    (marked,) = test_what_blocks_are_made_of.pytestmark  # type: ignore[attr-defined]
    assert [name for name, _ in marked.args[1]] == list(BLOCKS)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    into = groups * draw(st.integers(1, 3))
    out = into if draw(st.booleans()) else groups * draw(st.integers(1, 3))
    modes: list[PaddingMode] = ["zeros", "zeros", "reflect", "replicate", "circular"]
    mode = draw(st.sampled_from(modes))
    return Geometry(into, out, draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 1, 2])), groups, mode)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in UNFOLDABLE])
@settings(max_examples=20)  # of each of a dozen blocks
@given(geometry=geometries(), seed=st.integers(0, 1000))
def test_every_block_folds_in_every_geometry(name: str, geometry: Geometry, seed: int) -> None:
    """At random statistics, borders included; and what comes out is one and the same convolution, to the letter."""
    if name == "dbb" and geometry.dilation > 1:
        with pytest.raises(ReparamError, match="average pool, which knows no dilation"):
            BLOCKS[name](*astuple(geometry))
        return
    block = randomize(BLOCKS[name](*astuple(geometry)).double(), (8, geometry.in_channels, 7, 6), seed)
    folded = reparameterize(block)
    assert repr(folded) == repr(deploy_conv(*astuple(geometry)))
    x = torch.randn(2, geometry.in_channels, 7, 6, dtype=torch.float64)
    assert relative_error(folded(x), block(x)) <= rounding(block, x)


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_a_relu_in_a_branch_is_refused_by_name(name: str) -> None:
    model = RepVGG(FAMILY["repvgg_micro"], 10, width=0.25, block=name).eval()
    with pytest.raises(ReparamError, match=r"^stem\.block\.conv_kxk\.relu: ReLU is not known to be linear"):
        reparameterize(model)
    with pytest.raises(ValueError, match=f"the block {name} has no deploy form"):
        RepVGG(FAMILY["repvgg_micro"], 10, width=0.25, block=name, deploy=True)


def exported(model: nn.Module) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The graph that torch.export makes, and the shapes of its tensors."""
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    return str(program.graph), {name: tuple(t.shape) for name, t in program.state_dict.items()}


WIDELY_APART = ("repvgg", "dbb", "mobileone")  # branches, chains in branches, several branches of a kind


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(WIDELY_APART, id="widely apart"),
        pytest.param([name for name in BLOCKS if name not in (*UNFOLDABLE, *WIDELY_APART)], id="rest", marks=pytest.mark.slow),
    ],
)
def test_all_have_the_same_final_structure(names: Sequence[str]) -> None:
    """Table 7's caption, of every block there is: the same operators in the same order on the same shapes."""
    member = Member((1, 2, 1, 1), 0.125, 0.125)
    direct = exported(RepVGG(member, 10, deploy=True).eval())
    assert direct[0].count("torch.ops.aten.conv2d.default") == 6
    for name in names:
        assert exported(reparameterize(RepVGG(member, 10, block=name).eval())) == direct, name
    assert exported(RepVGG(member, 10).eval()) != direct


def test_dbb_has_its_border_right() -> None:
    """A 1x1 and its batch norm, then a border of what that makes of zero, then a 3x3 without padding: as its authors do."""
    branch = randomize(dbb(3, 5, stride=2).double(), (8, 3, 7, 7)).get_submodule("conv_1x1_kxk")
    first, second = branch.get_submodule("first"), branch.get_submodule("second")
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    kernel = first.get_submodule("conv").kernel()  # type: ignore[operator]
    norm = first.get_submodule("bn")
    border = norm(torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    assert border.abs().min() > 1e-3
    padded = F.pad(norm(F.conv2d(x, kernel)) - border, [1] * 4) + border
    wanted = second.get_submodule("bn")(F.conv2d(padded, second.get_submodule("conv").weight, stride=2))  # type: ignore[arg-type]
    assert relative_error(branch(x), wanted) <= rounding(branch, x)


def test_the_derived_kernels_are_their_formulas() -> None:
    """DESIGN: W = diag(a) I + diag(b) W_norm, I a delta on the first min(C1, C2) channels; and I + W."""
    for into, out in ((3, 5), (5, 3), (4, 4)):
        weight, a, b = torch.randn(out, into, 3, 3), torch.randn(out), torch.randn(out)
        identity = torch.zeros(out, into, 3, 3)
        for i in range(min(into, out)):
            identity[i, i, 1, 1] = 1
        dirac, trivial = DiracConv(into, out, 3), IdentityPlusConv(into, out, 3)
        assert (dirac.a == 1).all()
        assert torch.equal(dirac.b, torch.full((out,), 0.1))
        with torch.no_grad():
            dirac.weight.copy_(weight)
            dirac.a.copy_(a)
            dirac.b.copy_(b)
            trivial.weight.copy_(weight)
            by_filter = torch.stack([a[i] * identity[i] + b[i] * weight[i] / weight[i].square().sum().sqrt() for i in range(out)])
            assert torch.allclose(dirac.kernel(), by_filter, atol=1e-6)
            assert torch.equal(trivial.kernel(), identity + weight)
            for conv in (dirac, trivial):
                conv.set_kernel(weight)
                assert torch.allclose(conv.kernel(), weight, atol=1e-6)
    grouped = IdentityPlusConv(6, 6, 3, 1, 1, 1, 3)
    assert relative_error(F.conv2d(x := torch.randn(1, 6, 4, 4), grouped.delta(grouped.weight), padding=1, groups=3), x) == 0


@pytest.mark.parametrize("name", BLOCKS)
def test_every_branch_learns_and_nothing_but_parameters_is_kept(name: str) -> None:
    block = BLOCKS[name](4, 4)
    (block(torch.randn(4, 4, 6, 6)) * torch.randn(4, 4, 6, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in block.parameters())
    kinds = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "a", "b"}
    assert {key.rpartition(".")[2] for key in block.state_dict()} <= kinds  # trap 5: no identity kernel


def test_a_block_of_ones_own() -> None:
    @block
    def mine(g: Geometry) -> nn.Module:
        """3x3 + 3x1."""
        return Branches(conv_kxk=with_bn(g.conv()), conv_3x1=g.conv(3, 1, bias=True))

    try:
        assert mine.__doc__ == "3x3 + 3x1."
        model = randomize(RepVGG(FAMILY["repvgg_micro"], 10, width=0.25, block="mine").double())
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        assert relative_error(reparameterize(model)(x), model(x)) <= rounding(model, x)
    finally:
        del BLOCKS["mine"]
    with pytest.raises(ValueError, match=r"no block 'mine': there are repvgg, plain, no_identity, .*, qarepvgg"):
        find_block("mine")


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
    assert relative_error(folded(x), wanted) <= rounding(block, x)
    assert torch.equal(direct(x), folded(x))
    kernel = block.state_dict()["conv_kxk.conv.weight"]  # the training form itself, against torch's functions
    padded = F.pad(x, [dilation] * 4, mode="constant" if mode == "zeros" else mode)
    conv = block.get_submodule("conv_kxk.conv")
    assert relative_error(conv(x), F.conv2d(padded, kernel, None, stride, 0, dilation, 2)) <= rounding(conv, x)


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


def test_the_gradient_of_a_strided_conv1x1_stays_in_channels_last() -> None:
    """Mixed memory formats make the ReLU before it many times slower in the backward pass."""
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    conv = Conv1x1(4, 8, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    conv(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


TRAINING_STEP = """
import torch
from repvgg.fold.blocks import BLOCKS
from repvgg.models.names import FAMILY
from repvgg.models.repvgg import RepVGG

torch.manual_seed(0)
stems = [RepVGG(FAMILY["repvgg_a0"], width=0.25, block=name).stem for name in BLOCKS]
for model in (RepVGG(FAMILY["repvgg_micro"], 10, width=0.25), RepVGG(FAMILY["repvgg_a0"]).stem, *stems):
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    for _ in range(2):
        model(images).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
print("trained")
"""


def test_trap_11_training_in_channels_last_does_not_crash(forks: Forks, tmp_path: Path) -> None:
    """The stem at 224 px, in a process of its own: with nn.Conv2d in place of Conv1x1 it dies of a corrupted heap."""
    with forks.start(TRAINING_STEP, tmp_path) as process:
        step = process.wait()
    assert (step.code, step.out) == (0, "trained\n"), step.err


def test_squeeze_excite_rescales_channels() -> None:
    se = SqueezeExcite(32).double()
    assert [tuple(p.shape) for p in se.parameters()] == [(2, 32, 1, 1), (2,), (32, 2, 1, 1), (32,)]
    x = torch.randn(2, 32, 5, 4, dtype=torch.float64)
    w1, b1, w2, b2 = (p.squeeze() for p in se.parameters())
    wanted = x * torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2).view(2, 32, 1, 1)
    assert relative_error(se(x), wanted) <= rounding(se, x)
    assert SqueezeExcite(4).reduce.out_channels == 1


def test_with_bn_names_its_parts() -> None:
    assert list(with_bn(nn.Conv2d(3, 4, 3, bias=False)).state_dict()) == [
        "conv.weight",
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
