"""as_linear.py: any block, drawn at random, against direct float64 formulas written out here."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.fold.algebra import PaddingMode
from repvgg.fold.as_linear import Branches
from repvgg.fold.reparameterize import reparameterize


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
        possible += ["pool", "pool"]
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


# What chance may not leave out: every branch, in every dtype.
EACH = [
    Spec(3, 1, 1, 1, "zeros", 2, 4, 4, branches, dtype, seed=0)
    for branches in (("kxk", "1x1", "bn", "identity"), ("kxk", "pool"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
]


def of_each(test: Callable[..., None]) -> Callable[..., None]:
    """Run a property on one spec of each kind of branch and dtype, and then on random ones."""
    for spec in EACH:
        test = example(spec)(test)
    return test


@of_each
@settings(max_examples=50)
@given(specs())
def test_any_block_is_the_sum_of_its_formulas(s: Spec) -> None:
    """Kernel, stride, dilation, padding and its mode, groups, branches, conv bias, affine, eps and dtype at random.

    The folded kernel is rounded once to the block's dtype. So each output may be off by that rounding of each term and no more:
    the unit roundoff times what the same convolution gives on absolute values, beside float64's own.
    """
    block, formulas = build(s)
    folded = reparameterize(block)
    assert type(folded) is nn.Conv2d  # type: ignore[comparison-overlap]
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
    """Of random specs only how many differ is asserted; that every branch and dtype is among them is sure, by `EACH`."""
    drawn: list[Spec] = []

    @of_each
    @settings(max_examples=100)
    @given(specs())
    def collect(s: Spec) -> None:
        drawn.append(s)

    collect()
    different = {(s.kernel, s.stride, s.dilation, s.padding, s.mode, s.groups, s.branches, s.dtype) for s in drawn}
    assert len(different) >= 50
    wanted = {(b, d) for b in ("kxk", "1x1", "bn", "identity", "pool") for d in {s.dtype for s in EACH}}
    assert wanted <= {(b, s.dtype) for s in drawn for b in s.branches}
