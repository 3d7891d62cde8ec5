"""reparam.py against direct float64 formulas, timm and torchvision, always on random batch-norm statistics."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, PaddingMode, Pair, ReparamError, add, identity
from repvgg.fold.blocks import repvgg, with_bn
from repvgg.fold.reparam import Branches, FoldReport, as_linear, equivalent_kernel, is_foldable, reparameterize, verify
from repvgg.models.repvgg import FAMILY, RepVGG

EXACT = 1e-12


def report_of(folded: nn.Module) -> FoldReport:
    assert isinstance(folded.fold_report, FoldReport)
    return folded.fold_report


def small(**arguments: Any) -> RepVGG:
    """A member of the family that folds in an instant."""
    return randomize(RepVGG(FAMILY["repvgg_micro"], **{"num_classes": 10, "width": 0.25, **arguments}))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def assert_folds_exactly(model: nn.Module, shape: tuple[int, ...]) -> FoldReport:
    """Fold in float64 and compare; what was folded and left is the caller's to judge."""
    model = model.double().eval()
    folded = reparameterize(model)
    x = torch.randn(shape, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT
    return report_of(folded)


# ------------------------------------------------------------------------------ any block, against formulas written out here


@dataclass(frozen=True)
class Spec:
    """One geometry of a block, drawn at random."""

    kernel: int
    stride: int
    dilation: int
    padding: int
    mode: PaddingMode
    groups: int
    into: int
    out: int
    branches: tuple[str, ...]
    dtype: torch.dtype
    seed: int


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    kernel, dilation, stride = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    into = groups * draw(st.integers(1, 3))
    out = draw(st.sampled_from([into, groups, 2 * groups]))
    mode: PaddingMode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    same = dilation * (kernel // 2)
    padding = same + draw(st.sampled_from([0, 0, 0, 1]))
    possible = ["kxk", "kxk", "1x1", "1x1"]  # MobileOne has several of each
    if into == out and stride == 1 and padding == same:
        possible += ["bn", "identity"]
    if into == out and mode == "zeros" and dilation == 1 and padding <= kernel // 2:
        possible += ["pool"]
    chosen = draw(st.lists(st.sampled_from(range(len(possible))), min_size=1, unique=True))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    branches = tuple(possible[i] for i in chosen)
    if set(branches) <= {"identity", "pool"}:
        branches += ("kxk",)  # something must say how many channels there are
    return Spec(kernel, stride, dilation, padding, mode, groups, into, out, branches, dtype, draw(st.integers(0, 2**31)))


Formula = Callable[[Tensor], Tensor]


def convolution(s: Spec, kernel: int, groups: int, bias: bool) -> tuple[nn.Conv2d, Formula]:
    padding = s.padding - s.dilation * (s.kernel - kernel) // 2
    m = nn.Conv2d(s.into, s.out, kernel, s.stride, padding, s.dilation, groups, bias, s.mode).to(s.dtype)

    def formula(x: Tensor) -> Tensor:
        if padding:
            x = F.pad(x, [padding] * 4, mode="constant" if s.mode == "zeros" else s.mode)
        shift = None if m.bias is None else m.bias.double()
        return F.conv2d(x, m.weight.double(), shift, s.stride, 0, s.dilation, groups)

    return m, formula


def norm(channels: int, s: Spec, random: torch.Generator) -> tuple[nn.BatchNorm2d, Formula]:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(channels).uniform_(low, high, generator=random)

    eps = float(10 ** -uniform(1, 6)[0])
    m = nn.BatchNorm2d(channels, eps=eps, affine=bool(uniform(0, 1)[0] < 0.7))
    m.running_mean, m.running_var = uniform(-1, 1), uniform(0.1, 3)
    if m.affine:
        m.weight.data, m.bias.data = uniform(-2, 2), uniform(-1, 1)
    m = m.to(s.dtype)

    def formula(x: Tensor) -> Tensor:
        def wide(t: Tensor | None) -> Tensor:
            assert t is not None
            return t.double().view(channels, 1, 1)

        x = (x - wide(m.running_mean)) / torch.sqrt(wide(m.running_var) + eps)
        return x * wide(m.weight) + wide(m.bias) if m.affine else x

    return m, formula


def build(s: Spec) -> tuple[Branches, list[Formula]]:
    """The block, and each of its branches as a formula on float64 images."""
    random = torch.Generator().manual_seed(s.seed)
    torch.manual_seed(s.seed)
    modules: dict[str, nn.Module] = {}
    formulas: list[Formula] = []
    for i, branch in enumerate(s.branches):
        m: nn.Module
        formula: Formula
        if branch in ("kxk", "1x1"):
            groups = s.groups if torch.rand((), generator=random) < 0.7 else 1
            conv, convolve = convolution(
                s, s.kernel if branch == "kxk" else 1, groups, bool(torch.rand((), generator=random) < 0.5)
            )
            bn, normalise = norm(s.out, s, random)
            m, formula = nn.Sequential(conv, bn), lambda x, f=convolve, g=normalise: g(f(x))  # type: ignore[misc]
        elif branch == "bn":
            m, formula = norm(s.into, s, random)
        elif branch == "pool":
            m = nn.AvgPool2d(s.kernel, s.stride, s.padding)
            window = torch.full((s.into, 1, s.kernel, s.kernel), 1 / s.kernel**2, dtype=torch.float64)
            formula = lambda x, w=window: F.conv2d(F.pad(x, [s.padding] * 4), w, None, s.stride, 0, 1, s.into)  # type: ignore[misc]  # noqa: E731
        else:
            m, formula = nn.Identity(), lambda x: x
        modules[f"branch{i}"] = m
        formulas.append(formula)
    return Branches(**modules).eval(), formulas


@settings(max_examples=300)
@given(specs())
def test_any_block_is_the_sum_of_its_formulas(s: Spec) -> None:
    """Kernel, stride, dilation, padding and its mode, groups, branches, conv bias, affine, eps and dtype at random.

    The folded kernel is rounded once to the block's dtype. So each output may be off by that rounding of each term and no more:
    the unit roundoff times what the same convolution gives on absolute values, beside float64's own.
    """
    block, formulas = build(s)
    folded = reparameterize(block)
    assert type(folded) is nn.Conv2d
    assert folded.weight.dtype == folded.bias.dtype == s.dtype  # type: ignore[union-attr]
    side = s.dilation * (s.kernel - 1) + 1 + s.padding + s.stride
    x = torch.randn(2, s.into, side, side + 1, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([formula(x) for formula in formulas])
        got = copy.deepcopy(folded).double()(x)
        magnitude = copy.deepcopy(folded).double()
        for parameter in magnitude.parameters():
            parameter.abs_()
        unit = torch.finfo(s.dtype).eps / 2
        subnormal = torch.finfo(s.dtype).tiny * folded.weight[0].numel() * float(x.abs().max())
        allowed = unit * magnitude(x.abs()) + 1e-13 * wanted.abs().sum(0).max() + subnormal
    assert got.shape == wanted.shape[1:]
    assert bool(((got - wanted.sum(0)).abs() <= allowed).all())


def test_the_property_test_draws_what_it_claims() -> None:
    drawn: list[Spec] = []

    @settings(max_examples=300)
    @given(specs())
    def collect(s: Spec) -> None:
        drawn.append(s)

    collect()
    different = {(s.kernel, s.stride, s.dilation, s.padding, s.mode, s.groups, s.branches, s.dtype) for s in drawn}
    assert len(different) >= 200
    assert {s.dtype for s in drawn} == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    assert {b for s in drawn for b in s.branches} == {"kxk", "1x1", "bn", "identity", "pool"}


# ------------------------------------------------------------------------------------------------------- kernels and gradients


def test_equivalent_kernel_is_what_reparameterize_writes() -> None:
    model = small().double()
    folded = reparameterize(model)
    kernel, bias = equivalent_kernel(model.stages[2][1].block)  # type: ignore[index]
    conv = folded.get_submodule("stages.2.1.block")
    assert torch.equal(kernel, conv.weight)  # type: ignore[arg-type]
    assert torch.equal(bias, conv.bias)  # type: ignore[arg-type]
    assert kernel.dtype == torch.float64


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equivalent_kernel_is_differentiable(training: bool) -> None:
    block = randomize(repvgg(4, 4, groups=2).double(), (4, 4, 5, 5)).train(training)
    names = [name for name, _ in block.named_parameters()]

    def fold(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        for name, parameter in zip(names, parameters, strict=True):
            owner, _, last = name.rpartition(".")
            module = block.get_submodule(owner)
            module._parameters.pop(last, None)
            setattr(module, last, parameter)
        return equivalent_kernel(block)

    assert torch.autograd.gradcheck(fold, [p.detach().clone().requires_grad_() for p in block.parameters()])


def test_a_loss_on_the_folded_kernel_trains_the_branches() -> None:
    block = randomize(repvgg(4, 4), (4, 4, 5, 5)).train()
    statistics = {name: buffer.clone() for name, buffer in block.named_buffers()}
    equivalent_kernel(block)[0].square().sum().backward()
    for name, parameter in block.named_parameters():
        if "bias" not in name:  # a kernel does not depend on them
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in block.named_buffers())


# --------------------------------------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "regnetx_032"])
def test_networks_of_timm_fold_whole(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = randomize(timm.create_model(name, num_classes=10).double(), (4, 3, 64, 64))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    report = assert_folds_exactly(model, (2, 3, 64, 64))
    assert len(report.pairs) == norms > 0
    assert report.left == {}


def test_torchvision_resnet18_folds_whole() -> None:
    torchvision = pytest.importorskip("torchvision")
    report = assert_folds_exactly(randomize(torchvision.models.resnet18().double(), (4, 3, 64, 64)), (2, 3, 64, 64))
    assert len(report.pairs) == 20
    assert ("conv1", "bn1") in report.pairs
    assert ("layer2.0.downsample.0", "layer2.0.downsample.1") in report.pairs
    assert report.left == {}


def test_batch_norms_before_the_activation_are_reported_as_left() -> None:
    timm = pytest.importorskip("timm")
    model = randomize(timm.create_model("densenet121", num_classes=10).double(), (4, 3, 64, 64))
    report = assert_folds_exactly(model, (2, 3, 64, 64))
    assert ("features.denseblock1.denselayer1.conv1", "features.denseblock1.denselayer1.norm2") in report.pairs
    assert report.left["features.denseblock1.denselayer1.norm1"] == "no convolution feeds this batch norm alone"
    assert len(report.left) + len(report.pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


class Siblings(nn.Module):
    """A conv and its BN as attributes, with something to be put between or around them."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = norm or nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)).relu()
        return out


class OutputUsedTwice(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn(y) + y
        return out


class CalledTwice(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)) + self.conv(x * 2)
        return out


class WeightUsedByHand(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)  # type: ignore[arg-type]
        return out


class Between(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x).relu())
        return out


class Twisted(Siblings):
    """Branches on a value: its forward cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 0:
            x = x * 2
        out: Tensor = self.bn(x)
        return out


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)])
        self.bns = nn.ModuleDict({"0": nn.BatchNorm2d(4), "1": nn.BatchNorm2d(4), "last": nn.BatchNorm2d(4)})

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = self.bns[str(i)](conv(x)).relu()
        out: Tensor = self.bns["last"](x)
        return out


class OneConvTwoHomes(nn.Module):
    """One convolution, used with its batch norm in one place and without in another."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3)
        self.bare = nn.Sequential(conv, nn.ReLU())
        self.normed = nn.Sequential(conv, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bare(x) + self.normed(x)
        return out


class SharedWithTheUntraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3)
        self.hidden = Untraceable(conv)
        self.normed = nn.Sequential(conv, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hidden(x) + self.normed(x)
        return out


class Untraceable(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x if x.sum() > 0 else -x)
        return out


class Reaches(nn.Module):
    """Calls into a child's parts, past the child's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = with_bn(nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem(x) + self.stem.conv(x)  # type: ignore[operator]
        return out


class SharedBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.a(x)) + self.bn(self.b(x))
        return out


SMALL = (8, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OutputUsedTwice, "no convolution feeds this batch norm alone"),
        (Between, "no convolution feeds this batch norm alone"),
        (CalledTwice, "its Conv2d is used in more than one place"),
        (WeightUsedByHand, "its Conv2d is used in more than one place"),
        (OneConvTwoHomes, "its Conv2d is used in more than one place"),
        (SharedWithTheUntraceable, "its Conv2d is used in more than one place"),
        (Reaches, "its Conv2d is used in more than one place"),
        (SharedBatchNorm, "its BatchNorm2d is used in more than one place"),
        (Twisted, "its parent's forward cannot be traced"),
        (lambda: Siblings(nn.Conv2d(3, 4, 4, padding="same")), 'its Conv2d with padding="same" and an even kernel'),
        (lambda: Siblings(norm=nn.BatchNorm2d(4, track_running_stats=False)), "its BatchNorm2d has no running statistics"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_is_no_pair_is_left_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = randomize(make(), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == []
    (left,) = report.left.values()
    assert left.startswith(reason)
    assert reason in str(report)


def test_siblings_in_lists_and_dictionaries() -> None:
    report = assert_folds_exactly(randomize(Lists(), SMALL), SMALL)
    assert report.pairs == [("convs.0", "bns.0"), ("convs.1", "bns.1")]
    assert report.left == {"bns.last": "no convolution feeds this batch norm alone"}


def test_a_pair_inside_something_untraceable_still_folds() -> None:
    model = randomize(nn.Sequential(Siblings(), Twisted(nn.Conv2d(4, 4, 1))), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == [("0.conv", "0.bn")]
    assert report.left == {"1.bn": "its parent's forward cannot be traced"}


def test_a_module_used_twice_is_folded_once_and_stays_one() -> None:
    block = repvgg(4, 4)
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.ReLU(), block), SMALL)
    assert assert_folds_exactly(model, SMALL).blocks == ["1"]
    folded = reparameterize(model)
    assert folded.get_submodule("1") is folded.get_submodule("3")


def test_a_whole_pair_used_twice_is_folded() -> None:
    pair = with_bn(nn.Conv2d(3, 3, 3, padding=1))
    assert assert_folds_exactly(randomize(nn.Sequential(pair, nn.ReLU(), nn.Sequential(pair)), SMALL), SMALL).pairs == [
        ("0.conv", "0.bn")
    ]


def test_tied_weights() -> None:
    a, b, bare = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
    bare.weight = b.weight = a.weight
    report = assert_folds_exactly(randomize(nn.Sequential(with_bn(a), with_bn(b), bare), SMALL), SMALL)
    assert report.pairs == [("0.conv", "0.bn"), ("1.conv", "1.bn")]


def test_a_forward_that_stores_what_it_sees_stays_clean() -> None:
    class Stores(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x)

    folded = reparameterize(Stores().eval())
    assert report_of(folded).pairs == [("conv", "bn")]
    assert "seen" not in vars(folded)


def test_a_batch_norm_held_by_another_way_is_refused() -> None:
    class Alias(Siblings):
        def __init__(self) -> None:
            super().__init__()
            self.norms = [self.bn]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norms[0](self.conv(x))
            return out

    with pytest.raises(ReparamError, match=r"^1: uses a folded conv or batch norm in another way"):
        reparameterize(nn.Sequential(nn.ReLU(), Alias()).eval())


# ------------------------------------------------------------------------------------------------------------ traps of others


@pytest.mark.parametrize("path", ["", "stages", "stages.2.1.block.conv_1x1.bn", "stages.0.0.se"])
def test_trap_01_train_mode_is_refused(path: str) -> None:
    """Naming the first module in train mode."""
    model = small()
    model.get_submodule(path).training = True
    with pytest.raises(ReparamError, match=rf"^{path or 'RepVGG'}: is in train mode.*call \.eval\(\) first"):
        reparameterize(model)
    for a, b in ((model, small()), (small(), model)):
        with pytest.raises(ReparamError, match="is in train mode"):
            verify(a, b, (3, 32, 32))


def test_trap_01_train_mode_is_refused_in_one_block() -> None:
    block = repvgg(4, 4).eval()
    block.get_submodule("conv_kxk.bn").train()
    with pytest.raises(ReparamError, match=r"^conv_kxk\.bn: is in train mode"):
        as_linear(block)
    with pytest.raises(ReparamError, match=r"^Dropout: is in train mode"):
        as_linear(nn.Dropout())


def folds(block: nn.Module, shape: tuple[int, ...]) -> None:
    """The whole block becomes one convolution that gives the same numbers."""
    block = randomize(block, (8, *shape[1:])).double()
    folded = reparameterize(block)
    assert isinstance(folded, nn.Conv2d)
    x = torch.randn(shape, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(block, x)) <= EXACT


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_trap_04_grouped_identity_kernels(groups: int) -> None:
    block = repvgg(8, 8, groups=groups)
    folds(block, (2, 8, 6, 6))
    assert reparameterize(block).groups == groups


def test_trap_04_squeeze_excite_stays() -> None:
    model = randomize(RepVGG(FAMILY["repvgg_d2se"], 10, width=1 / 16).double())
    folded = reparameterize(model)
    before, after = ({n: p for n, p in m.state_dict().items() if ".se." in n} for m in (model, folded))
    assert len(before) == 48 * 4
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= EXACT


def test_trap_04_eps_that_differs() -> None:
    block = repvgg(4, 4)
    for i, bn in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.eps = (1e-1, 1e-3, 1e-7)[i]
    folds(block, (2, 4, 6, 6))


def test_trap_04_batch_norm_without_affine() -> None:
    folds(
        Branches(
            a=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)), b=nn.BatchNorm2d(4, affine=False)
        ),
        (2, 4, 6, 6),
    )


def test_trap_04_sync_batch_norm() -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(repvgg(4, 4), (8, 4, 6, 6)))  # it trains on no CPU
    pair = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(with_bn(nn.Conv2d(4, 5, 3)), (8, 4, 6, 6)))
    report = assert_folds_exactly(nn.Sequential(block, pair), (2, 4, 6, 6))
    assert (report.blocks, report.pairs, report.left) == (["0"], [("1.conv", "1.bn")], {})


@pytest.mark.parametrize("padding", [1, "same", (1, 1)])
def test_trap_04_convolutions_with_bias(padding: Any) -> None:
    conv3, conv1 = nn.Conv2d(4, 4, 3, padding=padding), nn.Conv2d(4, 4, 1, padding="valid")
    folds(Branches(a=with_bn(conv3), b=with_bn(conv1), c=nn.Conv2d(4, 4, 1)), (2, 4, 6, 6))


def test_trap_04_frozen_batch_norm() -> None:
    ops = pytest.importorskip("torchvision.ops")

    def frozen() -> nn.Module:
        m: nn.Module = ops.FrozenBatchNorm2d(4, eps=0.01)
        for name, buffer in m.named_buffers():
            buffer.copy_(torch.rand(4) + 0.1 if "var" in name else torch.randn(4))
        return m

    model = nn.Sequential(
        Branches(a=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), frozen()), b=frozen()), nn.Conv2d(4, 4, 3), frozen()
    )
    report = assert_folds_exactly(nn.Sequential(model, Branches(only=frozen())), (2, 4, 6, 6))
    assert (report.blocks, report.pairs, report.left) == (["0.0", "1"], [("0.1", "0.2")], {})


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_trap_05_models_of_any_dtype_convert_on_any_device(dtype: torch.dtype, device: str) -> None:
    """After a fold, too: nothing is cached that a later `.to()` would leave behind."""
    model = small()
    reparameterize(model)
    model = model.to(device, dtype)
    folded = reparameterize(model)
    assert {(t.dtype, t.device.type) for t in folded.state_dict().values()} == {(dtype, device)}
    result = verify(model, folded, (3, 32, 32))
    assert result.ok, result
    assert result.dtype == dtype


def test_trap_05_no_identity_kernel_leaks_into_the_state_dict() -> None:
    block = randomize(repvgg(4, 4, groups=2), (8, 4, 6, 6))
    statistics = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    wanted = {f"{bn}.{name}" for bn in ("conv_kxk.bn", "conv_1x1.bn", "identity") for name in statistics}
    wanted |= {"conv_kxk.conv.weight", "conv_1x1.conv.weight"}
    assert set(block.state_dict()) == wanted
    reparameterize(block)
    equivalent_kernel(block)
    block(torch.randn(1, 4, 6, 6))
    assert set(block.state_dict()) == wanted


class Nearly(nn.Module):
    """An output that hardly depends on the input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(10, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return 1000 + 0.02 * x.mean((1, 2, 3)).unsqueeze(1) * self.scale


def test_trap_07_a_constant_output_does_not_hide_a_wrong_fold() -> None:
    same, wrong = verify(Nearly(1).eval(), Nearly(1).eval(), (3, 8, 8)), verify(Nearly(1).eval(), Nearly(2).eval(), (3, 8, 8))
    assert same.ok
    assert wrong.max_rel_err < wrong.bound
    assert wrong.error.of_deviation > 1 / 3
    assert not wrong.ok
    assert str(wrong).startswith("NOT EQUAL in float32: relative error ")


def test_trap_07_a_small_mistake_is_found() -> None:
    model = small()
    folded = reparameterize(model)
    good = verify(model, folded, (3, 32, 32))
    assert good.ok
    assert good.max_rel_err <= 3e-6
    assert str(good).startswith("equal in float32: relative error ")
    with torch.no_grad():
        folded.get_submodule("stages.1.0.block").weight.mul_(1.001)  # type: ignore[operator]
    bad = verify(model, folded, (3, 32, 32))
    assert not bad.ok
    assert bad.max_rel_err > bad.bound


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trap_07_what_is_not_finite_is_never_equal(value: float) -> None:
    model = small()
    broken = reparameterize(model)
    with torch.no_grad():
        broken.get_submodule("head").bias[3] = value  # type: ignore[index, operator]
    assert not verify(model, broken, (3, 32, 32)).ok
    assert not verify(broken, broken, (3, 32, 32)).ok
    huge = nn.Conv2d(3, 4, 2).eval().half()
    nn.init.constant_(huge.weight, 6e4)
    assert not verify(huge, huge, (3, 2, 2)).ok  # both overflow: nothing is proved


def test_verify_compares_trees_of_tensors() -> None:
    class Features(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Any]:
            features: list[Tensor] = self.model.forward_intermediates(x)  # type: ignore[operator]
            return {"features": features, "classes": features[-1].mean((2, 3)).argmax(1)}

    model = small()
    folded = reparameterize(model)
    assert verify(Features(model).eval(), Features(folded).eval(), (3, 32, 32)).ok
    with pytest.raises(ReparamError, match="outputs differ in number or shape"):
        verify(Features(model).eval(), folded, (3, 32, 32))
    with pytest.raises(ReparamError, match="no tensors of floating point"):
        verify(nn.Sequential(model, ArgMax()).eval(), nn.Sequential(folded, ArgMax()).eval(), (3, 32, 32))
    with pytest.raises(ValueError, match="images is 1"):
        verify(model, folded, (3, 32, 32), images=1)


class ArgMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


DAMAGE = [
    ("stages.1.0.block.conv_kxk.bn.running_var", 0.0, "is 0 in channel 1; a variance is positive"),
    ("stages.1.0.block.conv_1x1.bn.running_var", -0.25, "is -0.25 in channel 1"),
    ("stages.2.1.block.identity.running_var", math.nan, "NaN or Inf"),
    ("stages.2.1.block.identity.running_mean", math.inf, "NaN or Inf"),
    ("stages.0.0.block.conv_kxk.conv.weight", math.nan, "NaN or Inf"),
    ("stem.block.conv_1x1.bn.weight", -math.inf, "NaN or Inf"),
    ("head.weight", math.nan, "NaN or Inf"),
]


@pytest.mark.parametrize(("name", "value", "words"), DAMAGE, ids=[f"{name}-{value}" for name, value, _ in DAMAGE])
def test_trap_10_a_damaged_tensor_is_refused_by_name(name: str, value: float, words: str) -> None:
    model = small()
    with torch.no_grad():
        model.state_dict()[name][1] = value
    with pytest.raises(ReparamError) as refused:
        reparameterize(model)
    assert str(refused.value).startswith(f"{name}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"), [("layer1.0.bn1.running_var", 0.0), ("layer1.0.bn1.running_mean", math.nan), ("conv1.weight", math.inf)]
)
def test_trap_10_in_a_stranger_s_network(name: str, value: float) -> None:
    model = pytest.importorskip("torchvision").models.resnet18().eval()
    with torch.no_grad():
        model.state_dict()[name][1] = value
    with pytest.raises(ReparamError, match=rf"^{name}: "):
        reparameterize(model)


def test_a_folded_kernel_that_does_not_fit_its_dtype_is_refused_by_name() -> None:
    for model, path in ((nn.Sequential(repvgg(3, 4)), "0"), (with_bn(nn.Conv2d(3, 4, 3)), "conv")):
        model = model.eval().half()
        for bn in model.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.running_var.fill_(1e-6)  # type: ignore[union-attr]
                nn.init.constant_(bn.weight, 6e4)
        with pytest.raises(ReparamError, match=rf"^{path}: the folded weight does not fit torch\.float16"):
            reparameterize(model)


def test_trap_14_the_tree_is_walked_by_type() -> None:
    """Names and depth play no part; all that was folded or left is reported."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anything = nn.Sequential(OrderedDict(deep=nn.ModuleDict({"down": Wrapper(repvgg(3, 6, stride=2))})["down"]))
            self.pair = with_bn(nn.Conv2d(6, 6, 3, groups=3))
            self.up = nn.ConvTranspose2d(6, 4, 2)
            self.alone = nn.BatchNorm2d(4)
            self.plain = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.plain(self.alone(self.up(self.pair(self.anything(x)))))
            return out

    report = assert_folds_exactly(randomize(Net(), (8, 3, 17, 17)), (2, 3, 17, 17))
    assert report.blocks == ["anything.deep.inside"]
    assert report.pairs == [("pair.conv", "pair.bn")]
    assert report.left == {"alone": "no convolution feeds this batch norm alone"}
    assert report.errors.keys() == {"anything.deep.inside", "pair.conv"}
    assert max(report.errors.values()) <= EXACT
    assert str(report).splitlines()[0].startswith("folded 1 blocks and 1 conv+BN pairs; largest error of a part ")
    assert str(report).splitlines()[1] == "left alone: no convolution feeds this batch norm alone"


class Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x).relu()
        return out


class MyConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class MyNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class MySequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x).abs()
        return out


class MyBranches(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


SUBCLASS = "is a subclass of {} and may compute something else: as_linear.register says what"


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (MyConv(4, 4, 3, padding=1), "branch: MyConv " + SUBCLASS.format("Conv2d")),
        (nn.Sequential(conv(), MyNorm(4)), "branch.1: MyNorm " + SUBCLASS.format("BatchNorm2d")),
        (MySequential(conv()), "branch: MySequential " + SUBCLASS.format("Sequential")),
        (MyBranches(a=conv()), "branch: MyBranches " + SUBCLASS.format("Branches")),
        (nn.Sequential(conv(), nn.ReLU()), "branch.1: ReLU is not known to be linear: move it out of the block"),
        (nn.Sequential(conv(), nn.BatchNorm2d(8)), "branch: 4 channels go into a map of 8"),
        (nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), "branch.1: has no running statistics"),
        (nn.BatchNorm2d(8), "the branches disagree in in channels: 4, 8"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "branch: with ceil_mode, or padding that is not counted"),
        (nn.AvgPool2d(3, 1, 1, ceil_mode=True), "branch: with ceil_mode, or padding that is not counted"),
        (nn.Conv2d(4, 4, 4, padding="same"), 'branch: with padding="same" and an even kernel'),
        (nn.utils.parametrizations.weight_norm(conv()), "branch: ParametrizedConv2d is parametrised: call"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_trap_15_what_is_not_linear_in_a_block_is_refused_by_name(branch: nn.Module, message: str) -> None:
    block = Branches(fine=with_bn(nn.Conv2d(4, 4, 3, padding=1)), branch=branch)
    with pytest.raises(ReparamError) as refused:
        reparameterize(nn.Sequential(nn.ReLU(), block).eval())
    path = "1." if message.startswith("branch") else "1: "
    assert str(refused.value).startswith(path + message)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Siblings(MyConv(3, 4, 3)), "its MyConv is a subclass of Conv2d"),
        (lambda: Siblings(norm=MyNorm(4)), "its MyNorm is a subclass of BatchNorm2d"),
        (
            lambda: Siblings(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
            "its ParametrizedConv2d is parametrised: call",
        ),
        (
            lambda: Siblings(nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 4, 3))),
            "its ParametrizedConv2d is parametrised: call",
        ),
    ],
)
def test_trap_15_strangers_are_left(make: Callable[[], nn.Module], reason: str) -> None:
    report = assert_folds_exactly(randomize(make(), SMALL), SMALL)
    assert report.left["bn"].startswith(reason)
    assert not report.pairs


def test_trap_15_a_stranger_s_branches_are_left_and_said() -> None:
    report = assert_folds_exactly(
        randomize(nn.Sequential(MyBranches(a=with_bn(conv()), b=nn.BatchNorm2d(4))), (8, 4, 6, 6)), (2, 4, 6, 6)
    )
    assert report.blocks == []
    assert report.pairs == [("0.a.conv", "0.a.bn")]
    assert report.left["0"] == "MyBranches " + SUBCLASS.format("Branches")
    assert "0.b" in report.left


@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "ScaledStdConv2d"])
def test_trap_15_other_convolutions_of_timm_are_left(name: str) -> None:
    layers = pytest.importorskip("timm.layers")
    model = randomize(nn.Sequential(getattr(layers, name)(3, 4, 3, stride=2), nn.BatchNorm2d(4)), SMALL)
    assert assert_folds_exactly(model, SMALL).left["1"].startswith(f"its {name} is a subclass of Conv2d")


def test_trap_15_batch_norm_act_keeps_its_activation() -> None:
    layers = pytest.importorskip("timm.layers")
    norm_act = layers.BatchNormAct2d
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), norm_act(4, act_layer=nn.SiLU), nn.Conv2d(4, 4, 1), norm_act(4, apply_act=False)), SMALL
    )
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == [("0", "1"), ("2", "3")]
    folded = reparameterize(model)
    assert [type(m) for m in folded.children()] == [nn.Conv2d, nn.SiLU, nn.Conv2d, nn.Identity]
    with pytest.raises(ReparamError, match=r"^a\.1: has an activation inside"):
        as_linear(Branches(a=model[:2]).eval())
    folds(Branches(a=model[2:]), (2, 4, 6, 6))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_trap_15_hooks(register: str) -> None:
    """Left beside a batch norm, refused in a block; hooks around both stay."""
    for name in ("conv", "bn"):
        model = randomize(Siblings(), SMALL)
        getattr(model.get_submodule(name), register)(lambda *_: None)
        report = assert_folds_exactly(model, SMALL)
        assert "carries forward hooks" in report.left["bn"]
    block = repvgg(4, 4).eval()
    getattr(block.get_submodule("conv_1x1.bn"), register)(lambda *_: None)
    with pytest.raises(ReparamError, match=r"^0\.conv_1x1\.bn: carries forward hooks.*remove them first"):
        reparameterize(nn.Sequential(block).eval())
    seen: list[int] = []
    outside = randomize(Siblings(), SMALL)
    getattr(outside, register)(lambda *_: seen.append(1))
    folded = reparameterize(outside)
    folded(torch.randn(SMALL))
    assert report_of(folded).pairs == [("conv", "bn")]
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_trap_15_old_weight_norm_is_refused_and_old_spectral_norm_left() -> None:
    weight_normed = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ReparamError, match=r"^0: `weight` is the result of a computation.*remove old-style weight_norm"):
        reparameterize(weight_normed)
    nn.utils.remove_weight_norm(weight_normed[0])
    assert assert_folds_exactly(randomize(weight_normed, SMALL), SMALL).pairs == [("0", "1")]
    spectral = randomize(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), SMALL)
    with torch.no_grad():
        report = assert_folds_exactly(spectral, SMALL)
    assert report.left["1"].startswith("its Conv2d carries forward hooks (old-style spectral_norm is one)")


def test_trap_15_a_forward_of_its_own_is_refused() -> None:
    """A deep copy's `forward` would still be the original's: what torch.compile returns, and what some packages patch in."""
    patched = nn.Sequential(nn.ReLU(), Siblings())
    patched[1].forward = lambda x: x
    compiled: Any = torch.compile(Siblings())
    model: Any
    for model, name in ((patched, "1"), (compiled, "OptimizedModule")):
        model.eval()
        with pytest.raises(ReparamError, match=rf"^{name}: has a forward of its own.*fold the plain module"):
            reparameterize(model)
        with pytest.raises(ReparamError, match=rf"^{name}: has a forward of its own"):
            verify(model, model, (3, 8, 8))
    patched_conv = conv().eval()
    vars(patched_conv)["forward"] = lambda x: x
    with pytest.raises(ReparamError, match=r"^a: has a forward of its own"):
        as_linear(Branches(a=patched_conv).eval())


# ------------------------------------------------------------------------------------------------------- what authors may add


class Scale(nn.Module):
    """A block type of someone else's: `scale * conv(x) + x`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = with_bn(nn.Conv2d(channels, channels, 3, padding=1))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.conv(x) + x
        return out


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def registered() -> Any:
    @as_linear.register(Scale)
    def scaled(m: Scale, channels: int | None) -> LinearMap:
        inner = as_linear.child("conv", m.conv, channels)
        inner = LinearMap(inner.kernel * m.scale, inner.bias * m.scale, padding=inner.padding)
        return add(inner, identity(inner.in_channels))

    @as_linear.register(DropPath)
    def nothing(m: DropPath, channels: int | None) -> LinearMap:
        assert channels is not None
        return identity(channels)

    yield
    for cls in (Scale, DropPath):
        del as_linear._readers[cls]


def test_a_block_type_of_one_s_own(registered: None) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), Scale(4), DropPath(), Branches(a=Scale(4), b=DropPath())), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert report.blocks == ["1", "3"]
    assert not report.left
    assert type(reparameterize(model).get_submodule("2")) is DropPath
    with torch.no_grad():
        model.get_submodule("3.a.conv.bn").running_var[0] = 0  # type: ignore[index, operator]
    with pytest.raises(ReparamError, match=r"^3\.a\.conv\.bn\.running_var: is 0"):
        reparameterize(model)


def test_a_reader_that_is_wrong_is_found_out() -> None:
    """Each part is compared with the module it came from: a bias forgotten, an output of another size."""

    class Wrong(Scale):
        pass

    for padding, words in (((1, 1), r"differs by [1-9]"), ((0, 0), "differs by inf")):

        @as_linear.register(Wrong)
        def forgets(m: Wrong, channels: int | None, padding: Pair = padding) -> LinearMap:
            return replace(as_linear.read(m.conv), padding=padding)

        with pytest.raises(ReparamError, match=rf"^0: its folded form {words}"):
            reparameterize(randomize(nn.Sequential(Wrong(3)), SMALL))
    del as_linear._readers[Wrong]


def test_without_registration_it_is_no_block() -> None:
    model = randomize(nn.Sequential(Scale(3), DropPath()), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert (report.blocks, report.pairs) == ([], [("0.conv.conv", "0.conv.bn")])


# ---------------------------------------------------------------------------------------------------- the result, the original


def test_the_original_is_untouched() -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(with_bn(nn.Conv2d(3, 4, 3)), repvgg(4, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    model = randomize(Net(), SMALL)
    model[0].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [(path, id(m), type(m), m.training) for path, m in model.named_modules()]
    tensors = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    folded = reparameterize(model)
    assert isinstance(folded, Net)
    with torch.no_grad():
        for tensor in folded.state_dict().values():
            tensor.zero_()
    assert objects == [(path, id(m), type(m), m.training) for path, m in model.named_modules()]
    assert tensors == [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "fold_report")
    assert not any(m.training for m in folded.modules())


def test_any_module_may_be_the_root() -> None:
    block = randomize(repvgg(4, 6, stride=2), (8, 4, 6, 6))
    assert_folds_exactly(block, (2, 4, 6, 6))
    assert report_of(reparameterize(block)).blocks == [""]
    with torch.no_grad():
        block.get_submodule("conv_1x1.bn").running_var[0] = 0  # type: ignore[index, operator]
    with pytest.raises(ReparamError, match=r"^conv_1x1\.bn\.running_var: is 0"):
        reparameterize(block)
    bare = nn.Conv2d(3, 4, 3).eval()
    assert str(report_of(reparameterize(bare))) == "folded 0 blocks and 0 conv+BN pairs; largest error of a part 0.0e+00"


def test_folding_twice_changes_nothing() -> None:
    once = reparameterize(small())
    twice = reparameterize(once)
    assert report_of(twice).blocks == []
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_memory_formats_are_kept_block_by_block() -> None:
    def is_channels_last(m: nn.Module) -> bool:
        weight: Any = m.get_parameter("weight")
        return not weight.is_contiguous() and bool(weight.is_contiguous(memory_format=torch.channels_last))

    last: Any = {"memory_format": torch.channels_last}
    pointwise_first = Branches(conv_1x1=with_bn(nn.Conv2d(4, 4, 1)), conv_kxk=with_bn(nn.Conv2d(4, 4, 3, padding=1)))
    model = nn.Sequential(repvgg(4, 4), repvgg(4, 4).to(**last), pointwise_first.to(**last), conv().to(**last), nn.BatchNorm2d(4))
    folded = reparameterize(randomize(model, (8, 4, 6, 6)))
    assert [is_channels_last(m) for m in list(folded.children())[:4]] == [False, True, True, True]


def test_convolutions_in_half_precision_with_batch_norms_in_single() -> None:
    model = randomize(nn.Sequential(repvgg(3, 4), with_bn(nn.Conv2d(4, 4, 3))), SMALL).bfloat16()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    assert {p.dtype for p in reparameterize(model).parameters()} == {torch.bfloat16}


def test_what_fits_any_number_of_channels_asks_for_it() -> None:
    for module in (nn.Identity(), nn.Dropout(), nn.Sequential(), nn.AvgPool2d(2), Branches(a=nn.Identity())):
        with pytest.raises(ReparamError, match=r"fits any number of channels: pass as_linear\(module, channels\)"):
            as_linear(module.eval())
        assert as_linear(module, 4).in_channels == 4
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    for pool in (nn.AvgPool2d(2), nn.AvgPool2d((3, 2), (1, 2), (1, 0)), nn.AvgPool2d(3, 2, 1, divisor_override=5)):
        assert relative_error(as_linear(pool.eval(), 4)(x), pool(x)) <= EXACT


def test_the_same_module_twice_in_one_sequence() -> None:
    bn = nn.BatchNorm2d(4)
    folds(Branches(a=nn.Sequential(conv(), bn, nn.Conv2d(4, 4, 1), bn, nn.Dropout2d()), b=bn, c=bn), (2, 4, 6, 6))


def test_is_foldable() -> None:
    blocks = [repvgg(4, 4), Branches(a=conv())]
    others = [
        conv(),
        with_bn(conv()),
        nn.BatchNorm2d(4),
        nn.Identity(),
        nn.AvgPool2d(2),
        nn.Dropout(),
        nn.ReLU(),
        MyBranches(a=conv()),
    ]
    assert [is_foldable(m) for m in (*blocks, *others)] == [True] * 2 + [False] * 8
