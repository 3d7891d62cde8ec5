"""models.py: the family against the paper's tables and timm, both forms of each member, and what the network can be asked for."""

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import error_of_deviation, randomize, relative_error
from foreign import NARROW, NUM_CLASSES, timm_architecture
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.blocks import Conv1x1
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY, NETWORKS
from repvgg.models.plain import layer_list
from repvgg.models.repvgg import Layer, RepVGG, Residual, is_deploy_form

PAPER = {name: member for name, member in FAMILY.items() if name != "repvgg_micro"}
IN_TIMM = set(PAPER) - {"repvgg_b1g2", "repvgg_b2g2", "repvgg_b3g2"}


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


# All layers, groups and squeeze-excites are there at a narrow width too; at full width they are slow.
WIDTHS = [
    *((name, NARROW[name][1] if name in NARROW else 1 / 8) for name in FAMILY),
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


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("name", sorted(IN_TIMM))
def test_at_full_width_shapes_are_timms(name: str, deploy: bool) -> None:
    timm, utils = pytest.importorskip("timm"), pytest.importorskip("timm.utils")
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
        theirs = utils.reparameterize_model(theirs) if deploy else theirs
    ours = to_timm(on_meta(name, deploy=deploy).state_dict())
    assert {key: t.shape for key, t in theirs.state_dict().items()} == {key: t.shape for key, t in ours.items()}


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_folds_in_float64(name: str) -> None:
    """At a quarter of its width: all its layers, groups and squeeze-excites are there."""
    model = randomize(RepVGG(FAMILY[name], 10, width=0.25).double())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert relative_error(outputs(reparameterize(model), x), outputs(model, x)) <= rounding(model, x)


# ------------------------------------------------------------------------------------------------------- what it can be asked


def small(**arguments: Any) -> RepVGG:
    return randomize(
        RepVGG(FAMILY["repvgg_micro"], **{"num_classes": 10, "width": 0.25, **arguments}), (8, arguments.get("in_chans", 3), 64, 64)
    )


def shapes(features: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(f.shape[1:]) for f in features]


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(("output_stride", "sides"), [(32, [32, 16, 8, 4, 2]), (16, [32, 16, 8, 4, 4]), (8, [32, 16, 8, 8, 8])])
def test_output_stride(output_stride: int, sides: list[int], deploy: bool) -> None:
    """Stages that keep their resolution dilate every 3x3 they have; the weights are those of output stride 32."""
    model = small(output_stride=output_stride, deploy=deploy)
    features = model.forward_intermediates(torch.randn(1, 3, 64, 64))
    assert [f.shape[2] for f in features] == [f.shape[3] for f in features] == sides
    model.load_state_dict(small(deploy=deploy).state_dict(), strict=True)
    for i, stage in enumerate(model.stages, 1):
        wanted = {32: 1, 16: {4: 2}.get(i, 1), 8: {3: 2, 4: 4}.get(i, 1)}[output_stride]
        convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert {conv.dilation for conv in convs} == {conv.padding for conv in convs} == {(wanted, wanted)}
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(outputs(reparameterize(model), x), outputs(model, x)) <= rounding(model, x)


@pytest.mark.parametrize(("output_stride", "stages"), [(16, {4: 2}), (8, {3: 2, 4: 4})])
def test_dilation_computes_the_same_features_more_densely(output_stride: int, stages: dict[int, int]) -> None:
    """Every output_stride-th position of the dense map is the sparse map, borders included.

    That holds where the first layer of a stage, which lost its stride, has the dilation of the stage before; ours dilates that
    one too ("all 3x3 of the last two stages", Table 8), so it is set back here.
    """
    sparse, dense = small().double(), small(output_stride=output_stride).double()
    dense.load_state_dict(sparse.state_dict())
    for stage, dilation in stages.items():
        conv = dense.get_submodule(f"stages.{stage - 1}.0.block.conv_kxk.conv")
        conv.dilation = conv.padding = (dilation // 2, dilation // 2)  # type: ignore[assignment]
    x = torch.randn(2, 3, 160, 96, dtype=torch.float64)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(sparse.forward_intermediates(x), dense.forward_intermediates(x), strict=True)):
            step = stages.get(i, 1)
            assert b.shape[2:] == (a.shape[2] * step, a.shape[3] * step)
            assert relative_error(b[..., ::step, ::step], a) <= rounding(lambda x, i=i: sparse.forward_intermediates(x)[i], x)


@pytest.mark.parametrize("size", [(33, 47), (65, 31), (1, 1), (224, 7)])
def test_odd_image_sizes(size: tuple[int, int]) -> None:
    model = small().double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    last = model.forward_features(x)
    assert last.shape[2:] == (-(-size[0] // 32), -(-size[1] // 32))
    assert relative_error(outputs(reparameterize(model), x), outputs(model, x)) <= rounding(model, x)


@pytest.mark.parametrize("deploy", [False, True])
def test_an_empty_batch(deploy: bool) -> None:
    model = small(deploy=deploy)
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 10)
    assert model.forward_features(torch.zeros(0, 3, 64, 64)).shape == (0, 64, 2, 2)


def test_small_input() -> None:
    model = small(small_input=True)
    assert shapes(model.forward_intermediates(torch.randn(1, 3, 32, 32))) == [
        (8, 32, 32),
        (8, 32, 32),
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
    ]
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(outputs(reparameterize(model), x), outputs(model, x)) <= rounding(model, x)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans: int) -> None:
    model = small(in_chans=in_chans)
    x = torch.randn(2, in_chans, 64, 64)
    assert relative_error(outputs(reparameterize(model), x), outputs(model, x)) <= rounding(model, x)


def test_width_scales_every_stage_and_suits_the_groups() -> None:
    assert PAPER["repvgg_a0"].widths(0.5) == (24, 24, 48, 96, 640)
    assert PAPER["repvgg_b0"].widths(2) == (64, 128, 256, 512, 2560)  # the stem never has more than 64
    for width in (0.01, 0.1, 0.33, 1.7):
        for member in PAPER.values():
            assert all(channels > 0 and channels % member.groups == 0 for channels in member.widths(width))
        on_meta("repvgg_b1g4", width=width)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output_stride": 4}, "output_stride is 4: choose 8, 16 or 32"),
        ({"block": "acme"}, "no block 'acme': there are repvgg, plain"),
        ({"num_classes": 0}, "at least 1"),
        ({"in_chans": 0}, "at least 1"),
        ({"width": 0}, "width is above 0"),
        ({"width": 1000}, "at most 16"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_meta("repvgg_micro", **arguments)


def test_features() -> None:
    """The five stages of Table 2, of which the stem is the first; any choice of them; and the head on the last."""
    model = small()
    seen: list[Tensor] = []
    for last in (model.stem, *(stage[-1] for stage in model.stages)):  # type: ignore[index]
        last.register_forward_hook(lambda _m, _args, out: seen.append(out))  # type: ignore[union-attr]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_intermediates(x)
        assert shapes(features) == [(8, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
        assert all(torch.equal(a, b) for a, b in zip(features, seen, strict=True))
        assert torch.equal(model.forward_features(x), features[-1])
        for indices, wanted in ((2, [3, 4]), ([0, 3], [0, 3]), ((4,), [4]), ([-1, 1], [4, 1])):
            chosen = model.forward_intermediates(x, indices)
            assert all(torch.equal(f, features[i]) for f, i in zip(chosen, wanted, strict=True))
        head = model.head
        assert relative_error(model(x), features[-1].mean((2, 3)) @ head.weight.T + head.bias) <= rounding(
            head, features[-1].mean((2, 3))
        )


@pytest.mark.parametrize("deploy", [False, True])
def test_torchvision_reaches_any_layer(deploy: bool) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = small(deploy=deploy)
    nodes = {"stages.2.3": "middle", "stem": "stem", "head": "logits"}
    extractor = extraction.create_feature_extractor(model, nodes)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = extractor(x)
        features = model.forward_intermediates(x)
        assert torch.equal(found["stem"], features[0])
        assert torch.equal(found["middle"], features[3])
        assert torch.equal(found["logits"], model(x))


def test_reset_classifier() -> None:
    model = small().double()
    features, old = model.forward_features(torch.randn(2, 3, 64, 64).double()), model.head
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(torch.randn(2, 3, 64, 64).double()).shape == (2, 7)
    assert model.forward_head(features).shape == (2, 7)
    assert (model.head.weight.dtype, model.head.training) == (torch.float64, False)
    assert model.head is not old


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_checkpointing_gives_equal_gradients(training: bool) -> None:
    """And equal running statistics: a batch counts once, though it is computed twice."""
    plain = small(small_input=True).train(training)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(4, 3, 32, 32)
    for model in (plain, checkpointed):
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    for (name, before), after in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(before, after), name


def test_activation_checkpointing_keeps_less() -> None:
    def kept(model: RepVGG) -> int:
        sizes: list[int] = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(4, 3, 32, 32)).sum()
        return sum(sizes)

    model = small(small_input=True).train()
    everything = kept(model)
    model.set_grad_checkpointing()
    assert kept(model) < everything / 2
    model.set_grad_checkpointing(False)
    assert kept(model) == everything


def test_the_stem_s_1x1_branch_is_the_one_that_does_not_crash() -> None:
    """Trap 11: every strided 1x1 of the training form."""
    strided = [m for m in small().modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)]
    assert len(strided) == 5
    assert {type(m) for m in strided} == {Conv1x1}


# ------------------------------------------------------------------------------------------------- the residual reorganisation


def test_the_residual_reorganisation_is_b0_with_shortcuts() -> None:
    """Table 7: one layer first and last; 2, 3 and 8 blocks of two in stages 2 to 4; shortcuts as in ResNet-18."""
    b0, residual = on_meta("repvgg_b0", block="plain"), RepVGG(NETWORKS["repvgg_b0_residual"], 10, width=0.125)
    assert [len(stage) for stage in residual.stages] == [2, 3, 8, 1]  # type: ignore[arg-type]
    assert [type(layer) for layer in residual.get_submodule("stages.3").children()] == [Layer]
    blocks = [m for m in residual.modules() if isinstance(m, Residual)]
    projections = [i for i, b in enumerate(blocks) if not isinstance(b.shortcut, nn.Identity)]
    assert projections == [0, 2, 5]  # where a stage begins
    kernels = [m for m in residual.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.stride for m in kernels] == [m.stride for m in b0.modules() if isinstance(m, nn.Conv2d)]
    whole = RepVGG(NETWORKS["repvgg_b0_residual"], deploy=True)
    shortcuts = 64 * 64 + 64 + 64 * 128 + 128 + 128 * 256 + 256
    assert count(whole) == count(on_meta("repvgg_b0", deploy=True)) + shortcuts


def test_a_residual_block_is_its_formula() -> None:
    model = randomize(RepVGG(NETWORKS["repvgg_b0_residual"], 10, width=0.125).double())
    block = model.get_submodule("stages.1.0")
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    wanted = torch.relu(block.block(torch.relu(block.layer.block(x))) + block.shortcut(x))  # type: ignore
    assert torch.equal(outputs(block, x.clone()), wanted)
    kept = x.clone()
    outputs(block, x)
    assert torch.equal(x, kept)  # the ReLUs in place touch nothing of the caller's


@pytest.mark.parametrize("options", [{}, {"block": "repvgg"}, {"output_stride": 8}, {"small_input": True}])
def test_the_residual_reorganisation_folds(options: dict[str, Any]) -> None:
    member = replace(NETWORKS["repvgg_b0_residual"], depths=(2, 4, 2, 1))
    model = randomize(RepVGG(member, 10, width=0.125, **options).double())
    folded = reparameterize(model)
    assert (is_deploy_form(model), is_deploy_form(folded)) == (False, True)
    direct = RepVGG(member, 10, width=0.125, deploy=True, **options).double().eval()
    direct.load_state_dict(folded.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= rounding(model, x)
    assert torch.equal(outputs(direct, x), outputs(folded, x))
    assert layer_list(folded) is None
