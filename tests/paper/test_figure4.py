# ruff: noqa: RUF001
import re
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rounding import REPORTED, rounding
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError, add
from repvgg.fold.as_linear import Branches, as_linear
from repvgg.fold.blocks import no_1x1, plain, repvgg, with_bn
from repvgg.paper import figure4
from repvgg.paper.result import PaperSettings


def trained(block: Branches) -> Branches:
    """With random batch norm statistics, which a fresh block does not have."""
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    return randomize(block, (8, channels, 8, 8))


def acb() -> Branches:
    return Branches(
        square=with_bn(nn.Conv2d(2, 2, 3, padding=1)),
        vertical=with_bn(nn.Conv2d(2, 2, (3, 1), padding=(1, 0), bias=False)),
        horizontal=nn.Conv2d(2, 2, (1, 3), padding=(0, 1)),
    )


BLOCKS = {
    "two_channels": lambda: repvgg(2, 2),
    "stride": lambda: repvgg(2, 3, stride=2),
    "only_3x3": lambda: plain(2, 2),
    "no_1x1": lambda: no_1x1(1, 1),
    "groups": lambda: repvgg(2, 2, groups=2),
    "dilation": lambda: repvgg(2, 2, dilation=2),
    "identity_without_bn": lambda: Branches(conv=with_bn(nn.Conv2d(2, 2, 3, padding=1)), identity=nn.Identity()),
    "no_bn": lambda: Branches(conv=nn.Conv2d(2, 2, 3, padding=1), pointwise=nn.Conv2d(2, 2, 1)),
    "large_kernel": lambda: Branches(conv=with_bn(nn.Conv2d(2, 2, 5, padding=2)), small=with_bn(nn.Conv2d(2, 2, 3, padding=1))),
    "acb": acb,
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> Branches:
    return trained(BLOCKS[request.param]())


def test_steps_add_up_to_the_block(block: Branches) -> None:
    s, total = figure4.steps(block), as_linear(block)
    padded = add(*(branch.padded for branch in s.branches))
    for m in (s.total, padded):
        assert torch.equal(m.kernel, total.kernel)
        assert torch.equal(m.bias, total.bias)
    for branch in s.branches:
        assert branch.padded.kernel.shape == total.kernel.shape
        assert branch.padded.kernel[branch.padded.kernel != 0].numel() == (branch.folded.kernel != 0).sum()


def test_every_step_computes_what_the_modules_do(block: Branches) -> None:
    x = torch.randn(2, as_linear(block).in_channels, 9, 9, dtype=torch.float64)
    s = figure4.steps(block)
    exact = block.double()
    with torch.no_grad():
        for branch, module in zip(s.branches, exact.children(), strict=True):
            wanted = module(x)
            unfolded = branch.kernel(x) if branch.norm is None else branch.norm(branch.kernel(x))
            for got in (unfolded, branch.folded(x), branch.padded(x)):
                assert relative_error(got, wanted) <= rounding(module, x)
        assert relative_error(s.total(x), exact(x)) <= rounding(exact, x)


def numbers_in(figure: Figure) -> Counter[str]:
    """The numbers in the cells of a figure, without the three of the colour scale."""
    numbers = [text.get_text() for text in figure.axes[0].texts if re.fullmatch(r"−?(\d*\.\d+|\d+)", text.get_text())]
    return Counter(numbers[:-3])


def written(tensors: Iterable[Tensor]) -> Counter[str]:
    return Counter(figure4.number(value) for tensor in tensors for value in tensor.flatten().tolist())


def test_the_picture_is_equation_3_number_by_number() -> None:
    """Against the equation written out in float64, for a 3x3 and an identity branch of two channels."""
    block = trained(no_1x1(2, 2))
    state = {name: tensor.double() for name, tensor in block.state_dict().items()}
    identity = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1)
    shown: list[Tensor] = []
    total, total_bias = torch.zeros(2, 2, 3, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for kernel, bn in ((state["conv_kxk.conv.weight"], "conv_kxk.bn"), (identity, "identity")):
        scale = state[f"{bn}.weight"] / torch.sqrt(state[f"{bn}.running_var"] + 1e-5)
        shift = state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale
        folded = kernel * scale.view(2, 1, 1, 1)
        padded = F.pad(folded, [(3 - kernel.shape[2]) // 2] * 4)
        shown += [kernel, scale, shift, folded, shift, padded, shift]
        total, total_bias = total + padded, total_bias + shift
    assert numbers_in(figure4.draw(block)) == written([*shown, total, total_bias])


def test_every_block_is_drawn_from_its_steps(block: Branches) -> None:
    s = figure4.steps(block)
    shown = [m.kernel for b in s.branches for m in (b.kernel, b.folded, b.padded) if m.groups == 1]
    shown += [s.total.kernel, s.total.bias] if s.total.groups == 1 else []
    shown += [m.bias for b in s.branches for m in (b.folded, b.padded)]
    assert not written(shown) - numbers_in(figure4.draw(block))


def test_columns_name_what_they_show() -> None:
    names = [text.get_text() for text in figure4.draw(trained(repvgg(2, 2))).axes[0].texts]
    assert [name for name in names if name in ("3×3", "1×1", "identity")] == ["3×3", "1×1", "identity"]
    assert "bias" in names
    assert {"scale", "shift"} <= set(names)


def test_refuses_many_channels() -> None:
    with pytest.raises(ValueError, match=r"^figure 4 writes out every number: [^\n]*at most 4 channels, not 5$"):
        figure4.draw(repvgg(2, 5).eval())


def test_refuses_train_mode_and_what_has_no_branches() -> None:
    with pytest.raises(ReparamError, match="train mode"):
        figure4.draw(repvgg(2, 2))
    with pytest.raises(ValueError, match="branches of a block"):
        figure4.draw(nn.Conv2d(2, 2, 3).eval())  # type: ignore[arg-type]


@given(st.floats(-999, 999))
def test_numbers_fit_a_cell_and_are_right_to_their_last_digit(value: float) -> None:
    text = figure4.number(value)
    assert len(text) <= 4
    assert abs(float(text.replace("−", "-")) - value) <= (0.5 if abs(value) > 9.9 else 0.0501 if abs(value) > 0.99 else 0.00501)
    assert (text == "0") == (value == 0)


def test_run_draws_a_block_whose_norms_fold_to_something() -> None:
    result = figure4.run(PaperSettings())
    assert 0 < result.data["max_rel_err"] < REPORTED
    scales = [text for text, n in numbers_in(result.figures["figure4"]).items() if n and text not in ("0", "1.0")]
    assert len(scales) > 20
