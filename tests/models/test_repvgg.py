"""models.py: the family against the paper's tables and timm, both forms of each member, and what the network can be asked for."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error_of_deviation, randomize, relative_error
from foreign import NARROW, NUM_CLASSES, timm_architecture
from members import SHALLOWER, SORTS
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY, Member
from repvgg.models.repvgg import RepVGG, is_deploy_form

PAPER = {name: member for name, member in FAMILY.items() if name not in ("repvgg_micro", "repvgg_mini")}
IN_TIMM = set(PAPER) - {"repvgg_b1g2", "repvgg_b2g2", "repvgg_b3g2", "repvgg_l2pse"}


def on_meta(name: str, **arguments: Any) -> RepVGG:
    with torch.device("meta"):
        return RepVGG(FAMILY[name], **arguments)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


# ------------------------------------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize(
    ("name", "depths", "widths"),
    [
        ("repvgg_a0", (2, 4, 14, 1), (48, 48, 96, 192, 1280)),
        ("repvgg_a1", (2, 4, 14, 1), (64, 64, 128, 256, 1280)),
        ("repvgg_a2", (2, 4, 14, 1), (64, 96, 192, 384, 1408)),
        ("repvgg_b0", (4, 6, 16, 1), (64, 64, 128, 256, 1280)),
        ("repvgg_b1", (4, 6, 16, 1), (64, 128, 256, 512, 2048)),
        ("repvgg_b2", (4, 6, 16, 1), (64, 160, 320, 640, 2560)),
        ("repvgg_b3", (4, 6, 16, 1), (64, 192, 384, 768, 2560)),
        ("repvgg_d2se", (8, 14, 24, 1), (64, 160, 320, 640, 2560)),
    ],
)
def test_tables_2_and_3(name: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> None:
    model = on_meta(name, deploy=True)
    assert tuple(len(stage) for stage in model.stages) == depths  # type: ignore[arg-type]
    assert (model.stem.block.out_channels, *(stage[-1].block.out_channels for stage in model.stages)) == widths  # type: ignore[index, union-attr]
    assert model.num_features == widths[-1]
    strides = [layer.block.stride for stage in model.stages for layer in stage]  # type: ignore[attr-defined, union-attr]
    firsts = [sum(depths[:stage]) for stage in range(4)]
    assert strides == [(2, 2) if i in firsts else (1, 1) for i in range(sum(depths))]
    assert model.stem.block.stride == (2, 2)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("deploy", [True, False])
def test_groups_on_every_other_layer_from_the_third_on(groups: int, deploy: bool) -> None:
    """The 3rd, 5th, ..., 21st, 23rd, 25th and 27th, counting the stem as the first; their 1x1 branch too."""
    model = on_meta(f"repvgg_b1g{groups}", deploy=deploy)
    layers = [model.stem, *(layer for stage in model.stages for layer in stage)]  # type: ignore[attr-defined]
    assert len(layers) == 28
    for position, layer in enumerate(layers, 1):
        wanted = groups if position in range(3, 28, 2) else 1
        assert {m.groups for m in layer.modules() if isinstance(m, nn.Conv2d)} == {wanted}, position


# Tables 4 and 5, truncated to two decimals as the paper does; D2se, from the official code, rounded.
PARAMS = {
    "repvgg_a0": 8.30,
    "repvgg_a1": 12.78,
    "repvgg_a2": 25.49,
    "repvgg_b0": 14.33,
    "repvgg_b1": 51.82,
    "repvgg_b1g2": 41.36,
    "repvgg_b1g4": 36.12,
    "repvgg_b2": 80.31,
    "repvgg_b2g4": 55.77,
    "repvgg_b3": 110.96,
    "repvgg_b3g4": 75.62,
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_of_tables_4_and_5(name: str) -> None:
    assert count(on_meta(name, deploy=True)) // 10_000 == round(PARAMS[name] * 100)


def test_parameters_of_d2se() -> None:
    assert round(count(on_meta("repvgg_d2se", deploy=True)) / 1e6, 2) == 120.39


@pytest.mark.parametrize(
    ("name", "a", "b", "groups"), [("repvgg_b2g2", 2.5, 5, 2), ("repvgg_b3g2", 3, 5, 2), ("repvgg_b1g4", 2, 4, 4)]
)
def test_parameters_of_the_grouped_by_a_formula_of_its_own(name: str, a: float, b: float, groups: int) -> None:
    """9 C_in C_out / g + C_out for each layer, and the classifier."""
    widths = [64] * 1 + [int(64 * a)] * 4 + [int(128 * a)] * 6 + [int(256 * a)] * 16 + [int(512 * b)]
    total, into = 0, 3
    for position, out in enumerate(widths, 1):
        g = groups if position >= 3 and position % 2 == 1 else 1
        total += 9 * into * out // g + out
        into = out
    assert count(on_meta(name, deploy=True)) == total + 1000 * into + 1000


# --------------------------------------------------------------------------------------------------- every member, both forms


@dataclass
class Folded:
    """A member with random statistics, and what it folds into."""

    name: str
    width: float
    model: RepVGG
    folded: nn.Module
    images: Tensor
    logits: Tensor
    folded_logits: Tensor


# All layers, groups and squeeze-excites are there at a narrow width too, in one member of each sort; the others are slow.
WIDTHS = [
    *(pytest.param((name, NARROW.get(name, (0, 1 / 8))[1]), marks=[] if name in SORTS else pytest.mark.slow) for name in FAMILY),
    *(pytest.param((name, 1), marks=pytest.mark.slow) for name in FAMILY),
]


@pytest.fixture(scope="module", params=WIDTHS, ids=lambda param: f"{param[0]}-{param[1]:.2g}")
def member(request: pytest.FixtureRequest) -> Folded:
    torch.manual_seed(0)
    name, width = request.param
    model = randomize(RepVGG(FAMILY[name], NUM_CLASSES, width=width))
    folded = reparameterize(model)
    images = torch.randn(4, 3, 64, 64)
    return Folded(name, width, model, folded, images, outputs(model, images), outputs(folded, images))


def test_every_member_folds_in_float32(member: Folded) -> None:
    assert relative_error(member.folded_logits, member.logits) <= rounding(member.model, member.images)
    allowed = rounding(member.model, member.images, error=error_of_deviation)
    assert error_of_deviation(member.folded_logits, member.logits) <= allowed
    assert float(member.logits.std(0).mean() / member.logits.abs().max()) > 0.01  # they do depend on the image


def test_every_layer_of_a_member_is_folded(member: Folded) -> None:
    layers = 1 + sum(FAMILY[member.name].depths)
    assert len(member.folded.fold_report.blocks) == layers  # type: ignore[union-attr, arg-type]
    assert not member.folded.fold_report.left  # type: ignore[union-attr]
    assert (is_deploy_form(member.model), is_deploy_form(member.folded)) == (False, True)


def test_trap_03_the_deploy_form_built_directly_loads_what_was_folded(member: Folded) -> None:
    direct = on_meta(member.name, num_classes=NUM_CLASSES, width=member.width, deploy=True).eval()
    direct.load_state_dict(member.folded.state_dict(), strict=True, assign=True)
    assert torch.equal(outputs(direct, member.images), member.folded_logits)
    assert is_deploy_form(direct)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our keys in timm's words."""
    words = (
        (r"\.block\.(weight|bias)$", r".reparam_conv.\1"),
        (r"\.block\.", "."),
        (r"\.se\.reduce\.", ".attn.fc1."),
        (r"\.se\.expand\.", ".attn.fc2."),
        (r"^head\.", "head.fc."),
    )
    for pattern, word in words:
        state = {re.sub(pattern, word, key): tensor for key, tensor in state.items()}
    return state


def test_timm_agrees_in_both_forms(member: Folded) -> None:
    if member.name not in IN_TIMM:
        pytest.skip("timm has no such member")
    utils = pytest.importorskip("timm.utils")
    with torch.device("meta"):
        theirs = timm_architecture(member.name, member.width).eval()
    theirs.load_state_dict(to_timm(member.model.state_dict()), strict=True, assign=True)
    assert relative_error(outputs(theirs, member.images), member.logits) <= rounding(member.model, member.images)
    theirs = utils.reparameterize_model(theirs)
    assert {key: t.shape for key, t in theirs.state_dict().items()} == {
        key: t.shape for key, t in to_timm(member.folded.state_dict()).items()
    }
    assert relative_error(outputs(theirs, member.images), member.folded_logits) <= rounding(member.folded, member.images)
    theirs.load_state_dict(to_timm(member.folded.state_dict()), strict=True)
    assert relative_error(outputs(theirs, member.images), member.folded_logits) <= rounding(member.folded, member.images)


@pytest.mark.parametrize("name", sorted(IN_TIMM))
def test_at_full_width_the_deploy_forms_shapes_are_timms(name: str) -> None:
    """The training form's: test_keys.py."""
    timm, utils = pytest.importorskip("timm"), pytest.importorskip("timm.utils")
    with torch.device("meta"):
        theirs = utils.reparameterize_model(timm.create_model(name, num_classes=1000))
    ours = to_timm(on_meta(name, deploy=True).state_dict())
    assert {key: t.shape for key, t in theirs.state_dict().items()} == {key: t.shape for key, t in ours.items()}


@pytest.mark.parametrize("name", SHALLOWER)  # the deepest: test_load_foreign.py
def test_every_member_folds_in_float64(name: str) -> None:
    """At a quarter of its width: all its layers, groups and squeeze-excites are there."""
    model = randomize(RepVGG(FAMILY[name], 10, width=0.25).double())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert relative_error(outputs(reparameterize(model), x), outputs(model, x)) <= rounding(model, x)


@pytest.mark.parametrize("kind", [{}, {"squeeze_excite": True}, {"squeeze_excite": True, "plus": True}, {"residual": True}])
def test_torch_jit_scripts_the_deploy_form(kind: Any, tmp_path: Path) -> None:
    model = randomize(RepVGG(Member((2, 1, 1, 1), 0.125, 0.0625, **kind), num_classes=4), (8, 3, 32, 32))
    deploy = reparameterize(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript says that it is not developed further
        scripted = torch.jit.script(deploy)
        scripted.save(tmp_path / "scripted.pt")
        opened = torch.jit.load(tmp_path / "scripted.pt")
    assert list(scripted.state_dict()) == list(deploy.state_dict())
    for x in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 64, 40)):
        assert torch.equal(opened(x), deploy(x))
