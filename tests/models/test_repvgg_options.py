"""repvgg.py: what the network can be asked for."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.blocks import Conv1x1
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY, NETWORKS
from repvgg.models.plain import layer_list
from repvgg.models.repvgg import Layer, RepVGG, Residual, is_deploy_form

PAPER = {name: member for name, member in FAMILY.items() if name not in ("repvgg_micro", "repvgg_mini")}
IN_TIMM = set(PAPER) - {"repvgg_b1g2", "repvgg_b2g2", "repvgg_b3g2"}


def on_meta(name: str, **arguments: Any) -> RepVGG:
    with torch.device("meta"):
        return RepVGG(FAMILY[name], **arguments)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


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
    features = model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
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
        for i, (a, b) in enumerate(
            zip(
                sparse.forward_intermediates(x, intermediates_only=True),
                dense.forward_intermediates(x, intermediates_only=True),
                strict=True,
            )
        ):
            step = stages.get(i, 1)
            assert b.shape[2:] == (a.shape[2] * step, a.shape[3] * step)
            assert relative_error(b[..., ::step, ::step], a) <= rounding(
                lambda x, i=i: sparse.forward_intermediates(x, intermediates_only=True)[i], x
            )


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
    assert shapes(model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)) == [
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
        ({"num_classes": -1}, "num_classes is -1: at least 1, or 0 for a backbone"),
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
        features = model.forward_intermediates(x, intermediates_only=True)
        assert shapes(features) == [(8, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
        assert all(torch.equal(a, b) for a, b in zip(features, seen, strict=True))
        assert torch.equal(model.forward_features(x), features[-1])
        for indices, wanted in ((2, [3, 4]), ([0, 3], [0, 3]), ((4,), [4]), ([-1, 1], [1, 4])):
            chosen = model.forward_intermediates(x, indices, intermediates_only=True)
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
        features = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(found["stem"], features[0])
        assert torch.equal(found["middle"], features[3])
        assert relative_error(found["logits"], model(x)) <= rounding(model, x)  # traced, a strided 1x1 is written otherwise


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
