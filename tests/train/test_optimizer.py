"""train/optimizer.py: parameter groups of a real model, and the official L2 term against its definition."""

import pytest
import torch
from conftest import randomize
from torch import nn

from repvgg.fold.as_linear import equivalent_kernel
from repvgg.fold.blocks import no_identity, repvgg
from repvgg.models import zoo
from repvgg.train.optimizer import custom_l2, parameter_groups
from repvgg.train.recipes import Recipe


def test_weight_decay_is_on_kernels_alone() -> None:
    """Section 4.1. The list is written out by hand for the stem and a layer with three branches."""
    model = zoo.create_model("repvgg_micro", num_classes=10)
    kernels, others = parameter_groups(model, Recipe())
    assert (kernels["weight_decay"], others["weight_decay"]) == (1e-4, 0)
    assert (kernels["lr_scale"], others["lr_scale"]) == (1, 1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = ({names[p] for p in group["params"]} for group in (kernels, others))
    assert len(decayed) + len(spared) == len(names)

    def of(names: set[str], prefix: str) -> set[str]:
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    assert of(decayed, "stem.") == {"block.conv_kxk.conv.weight", "block.conv_1x1.conv.weight"}
    assert of(decayed, "stages.0.1.") == {"block.conv_kxk.conv.weight", "block.conv_1x1.conv.weight"}
    assert of(spared, "stages.0.1.") == {
        "block.conv_kxk.bn.weight",
        "block.conv_kxk.bn.bias",
        "block.conv_1x1.bn.weight",
        "block.conv_1x1.bn.bias",
        "block.identity.weight",
        "block.identity.bias",
    }
    assert of(decayed, "head.") == {"weight"}
    assert of(spared, "head.") == {"bias"}
    layers = 1 + sum((2, 2, 4, 1))
    assert len(decayed) == 2 * layers + 1


def test_identity_branches_decay_where_asked_for() -> None:
    """As the official README advises: folded, such a weight is a kernel's centre."""
    model = zoo.create_model("repvgg_micro", num_classes=10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, more = ({names[p] for p in parameter_groups(model, Recipe(decay_identity=on))[0]["params"]} for on in (False, True))
    assert decayed < more
    assert more - decayed == {name for name in names.values() if name.endswith("identity.weight")}
    assert len(more - decayed) == 5  # micro has 2, 2, 4 and 1 layers, the first of each at stride 2


def test_each_stage_has_its_share_of_the_learning_rate() -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10)
    groups = parameter_groups(model, Recipe(layer_decay=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(names)
    wanted = {"stem.": 1 / 32, "stages.0.": 1 / 16, "stages.1.": 1 / 8, "stages.2.": 1 / 4, "stages.3.": 1 / 2, "head.": 1}
    for prefix, share in wanted.items():
        assert {value for name, value in scale.items() if name.startswith(prefix)} == {share}


def test_biases_of_batch_norms_have_a_learning_rate_of_their_own_where_asked_for() -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, Recipe(layer_decay=0.5, bn_bias_lr=16))
    scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(names)
    assert {value for name, value in scale.items() if name.startswith("stages.3.") and name.endswith("bias")} == {8}
    assert {value for name, value in scale.items() if name.startswith("stages.3.") and name.endswith("weight")} == {1 / 2}
    assert scale["head.bias"] == scale["head.weight"] == 1


def test_frozen_parameters_are_in_no_group() -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10)
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)
    assert sum(len(group["params"]) for group in parameter_groups(model, Recipe())) == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_the_official_l2_term_by_loops_over_its_definition(groups: int) -> None:
    """A block at a time, a number at a time, in float64; and its gradient by finite differences."""
    block = _block(8, groups)
    k3, k1 = block.conv_kxk.conv.weight.detach(), block.conv_1x1.conv.weight.detach()  # type: ignore[union-attr, operator]
    total = 0.0
    for o in range(k3.shape[0]):
        t3, t1 = (
            float(bn.weight[o].detach() / (bn.running_var[o] + bn.eps) ** 0.5)  # type: ignore[index, operator, union-attr]
            for bn in (block.conv_kxk.bn, block.conv_1x1.bn)  # type: ignore[union-attr]
        )
        for i in range(k3.shape[1]):
            around = sum(float(k3[o, i, r, c]) ** 2 for r in range(3) for c in range(3) if (r, c) != (1, 1))
            centre = t3 * float(k3[o, i, 1, 1]) + t1 * float(k1[o, i, 0, 0])
            total += around + centre**2 / (t3**2 + t1**2)
    assert float(custom_l2(block).detach()) == pytest.approx(total / 2, rel=1e-12)

    def term(kernel: torch.Tensor, pointwise: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(  # type: ignore[no-any-return]
            _Term(block), {"block.conv_kxk.conv.weight": kernel, "block.conv_1x1.conv.weight": pointwise}, ()
        )

    inputs = [k.detach().clone().requires_grad_(True) for k in (k3, k1)]
    assert torch.autograd.gradcheck(term, inputs)


def test_the_l2_term_decays_what_is_deployed() -> None:
    """Where the 1x1 branch cancels the centre of the 3x3, nothing is left there to decay."""
    block = _block(8, 1, identity=False)
    t3, t1 = (getattr(block, n).bn.weight / (getattr(block, n).bn.running_var + 1e-5).sqrt() for n in ("conv_kxk", "conv_1x1"))
    with torch.no_grad():
        centre = block.conv_kxk.conv.weight[:, :, 1:2, 1:2]  # type: ignore[union-attr, index]
        block.conv_1x1.conv.weight.copy_(-(t3 / t1).view(-1, 1, 1, 1) * centre)  # type: ignore[union-attr, operator]
        around = block.conv_kxk.conv.weight.square().sum() - centre.square().sum()  # type: ignore[union-attr, operator]
        kernel, _ = equivalent_kernel(block)
    assert float(custom_l2(block).detach()) == pytest.approx(float(around) / 2, rel=1e-10)
    assert kernel[:, :, 1, 1].abs().max() < 1e-10


def test_the_l2_term_takes_the_place_of_weight_decay() -> None:
    model = zoo.create_model("repvgg_micro", num_classes=10)
    kernels, _ = parameter_groups(model, Recipe(custom_l2=True))
    assert [tuple(p.shape) for p in kernels["params"]] == [(10, 256)]  # the classifier's alone


class _Term(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self) -> torch.Tensor:
        return custom_l2(self.block)


def _block(channels: int, groups: int, identity: bool = True) -> nn.Module:
    block = (repvgg if identity else no_identity)(channels, channels, groups=groups).double()
    return randomize(block, (4, channels, 9, 9))
