"""proof.py: right folds are equal, wrong ones are not, and what cannot be judged is said to be so."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import randomize
from folding import small
from rounding import REPORTED
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import as_linear
from repvgg.fold.blocks import repvgg, with_bn
from repvgg.fold.proof import _widened, check_part, verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import FAMILY, Member
from repvgg.models.repvgg import RepVGG


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
    assert wrong.max_rel_err < 1e-5
    assert wrong.error.of_deviation > 1
    assert not wrong.ok
    assert str(wrong).startswith("NOT EQUAL in float32: relative error ")


def test_trap_07_a_small_mistake_is_found() -> None:
    model = small()
    folded = reparameterize(model)
    good = verify(model, folded, (3, 32, 32))
    assert good.ok
    assert good.max_rel_err <= REPORTED
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
            features: list[Tensor] = self.model.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
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


# ------------------------------------------------------------------------------------------ three verdicts, and their reasons


def one_element_off(model: nn.Module, layer: int, by: float = 1e-3) -> nn.Module:
    """A copy with one element of one convolution's kernel changed (but in squeeze-excite, whose gates may be shut)."""
    wrong = copy.deepcopy(model)
    kernels = [m.weight for name, m in wrong.named_modules() if isinstance(m, nn.Conv2d) and ".se." not in name]
    with torch.no_grad():
        kernel = kernels[layer % len(kernels)].flatten()
        kernel[kernel.abs().argsort()[len(kernel) // 2]] *= 1 + by
    return wrong


# At this width members differ in depth, groups and squeeze-excite: the quick ones have each of these, the rest are the same again.
QUICK = {name: FAMILY[name] for name in ("repvgg_a0", "repvgg_b1g2")} | {"se": replace(FAMILY["repvgg_micro"], squeeze_excite=True)}
REST = {name: member for name, member in FAMILY.items() if name not in (*QUICK, "repvgg_micro")}


@pytest.mark.parametrize(
    "member",
    [
        *(pytest.param(member, id=name) for name, member in QUICK.items()),
        *(pytest.param(member, id=name, marks=pytest.mark.slow) for name, member in REST.items()),
    ],
)
def test_one_wrong_element_is_caught_on_every_member(member: Member) -> None:
    model = randomize(RepVGG(member, num_classes=10, width=0.25 if member is QUICK["se"] else 1 / 32), (4, 3, 64, 64)).double()
    folded = reparameterize(model)
    assert verify(model, folded, (3, 64, 64)).ok
    for layer in (0, 13, -1):
        found = verify(model, one_element_off(folded, layer), (3, 64, 64), images=2)
        assert found.verdict == "NOT EQUAL", (layer, found)


class Amplifier(nn.Module):
    """Multiplies differences between its inputs by `gain`: where they are nearly equal, its own rounding too."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.conv = with_bn(nn.Conv2d(3, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).sigmoid()  # or the gain would be folded too
        return (y * self.gain).sin()


@pytest.mark.parametrize("gain", [1e3, 1e10, 1e16])
def test_a_network_that_amplifies_rounding_is_judged_by_its_condition(gain: float) -> None:
    model = randomize(Amplifier(gain), (8, 3, 8, 8)).double()
    folded = reparameterize(model)
    found = verify(model, folded, (3, 8, 8))
    assert found.ok, found
    assert f"one unit in the last place moves the output by {found.own.relative:.1e}" in str(found)
    assert found.own.relative > min(1e-17 * gain, 0.1)
    assert ("step by step" in str(found)) == (gain > 1e6)
    assert verify(model, one_element_off(folded, 0), (3, 8, 8)).verdict == "NOT EQUAL"


def test_what_cannot_be_judged_says_what_to_compare_instead() -> None:
    model = randomize(Amplifier(1e8), (8, 3, 8, 8))
    found = verify(model, copy.deepcopy(model), (3, 8, 8))  # in float32 its own rounding is as large as its output
    assert (found.verdict, found.ok) == ("cannot be judged", False)
    assert str(found).startswith("cannot be judged in float32: ")
    assert str(found).endswith("; compare both in float64 (.double())")
    assert verify(model.double(), copy.deepcopy(model).double(), (3, 8, 8)).ok


class Detector(nn.Module):
    """The five places that score best, as a detector gives them: which ones is decided by the last digit."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = with_bn(nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.backbone(x).sigmoid().flatten(1)
        found = (scores * 1e13).sin().topk(5)
        return {"boxes": found.indices.double() / scores.shape[1], "labels": found.indices}


def test_of_detections_the_features_are_compared() -> None:
    model = randomize(Detector(), (8, 3, 8, 8)).double()
    folded = reparameterize(model)
    found = verify(model, folded, (3, 8, 8))
    assert found.ok
    assert found.compared == ("backbone",)
    assert "equal in float64 (outputs are discrete: backbone compared instead)" in str(found)
    assert verify(model, one_element_off(folded, 0), (3, 8, 8)).verdict == "NOT EQUAL"


@pytest.mark.slow
def test_a_deep_network_with_random_statistics() -> None:
    """timm's efficientnetv2_rw_t multiplies its own rounding by many orders of magnitude."""
    model = pytest.importorskip("timm").create_model("efficientnetv2_rw_t").double().eval()
    random = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(generator=random)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2, generator=random)  # type: ignore[union-attr]
    folded = reparameterize(model)
    right = verify(model, folded, (3, 64, 64), images=2)
    assert right.ok, right
    assert right.own.relative > 1e-11  # one unit in the last place is 2e-16
    assert "step by step" in str(right)
    for layer in (0, 2, -1):  # deeper ones may be behind a gate that random statistics have shut
        wrong = verify(model, one_element_off(folded, layer), (3, 64, 64), images=2)
        assert not wrong.ok, (layer, wrong)


@pytest.mark.slow
def test_different_detectors_are_not_equal() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval())
    changed = copy.deepcopy(nets[0])
    with torch.no_grad():
        for tensor in list(changed.parameters())[10:16]:
            tensor.mul_(1.5)
    size = 3, 320, 320
    assert not verify(nets[0], nets[1], size, images=2).ok
    assert not verify(nets[0], changed, size, images=2).ok
    assert verify(nets[0], copy.deepcopy(nets[0]), size, images=2).verdict != "NOT EQUAL"


@torch.no_grad()
def test_a_wide_part_may_round_as_its_sums_do_and_no_more() -> None:
    """One thread adds up thousands of products in a row. Moving each by a unit in the last place shows little of that."""
    threads = torch.get_num_threads()
    block = randomize(repvgg(512, 512), (2, 512, 4, 4)).double()
    folded: Any = as_linear(block)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert check_part(block, folded) < 16 * 2**-53 * math.sqrt(512 * 9)
    finally:
        torch.set_num_threads(threads)
    folded.kernel[5, 7, 1, 1] += 1e-10 * folded.kernel.abs().max()
    with pytest.raises(ReparamError, match="its folded form differs by"):
        check_part(block, folded)


class Casts(nn.Module):
    """Takes bytes, as many detectors do, and says what type it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images.float() / 255))  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", [torch.rand(2, 3, 8, 8), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)])
def test_a_forward_that_casts_is_compared_in_float64_all_the_same(example: Tensor) -> None:
    model = randomize(Casts(), (8, 3, 8, 8))
    folded = reparameterize(model, example)
    whole = folded.fold_report.whole
    assert whole is not None
    assert whole.ok
    assert not verify(model, one_element_off(folded, 0), (3, 8, 8)).ok


def test_inputs_are_widened_where_they_are() -> None:
    """Those of a network on a GPU stay there; the meta device stands for one."""
    wide = _widened(torch.empty(1, device="meta"))
    assert (wide.device.type, wide.dtype) == ("meta", torch.float64)
    labels = torch.zeros(1, dtype=torch.int64)
    assert _widened(labels) is labels


def test_of_chosen_outputs_operators_are_no_witness() -> None:
    """A convolution that has taken up its batch norm gives something else than before, by right."""

    class AtTheRoot(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            del self.backbone

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            scores = self.bn(self.conv(x)).sigmoid().flatten(1)
            found = (scores * 1e13).sin().topk(5)
            return {"boxes": found.indices.double() / scores.shape[1], "labels": found.indices}

    model = randomize(AtTheRoot(), (8, 3, 8, 8)).double()
    assert verify(model, reparameterize(model), (3, 8, 8)).verdict == "cannot be judged"


def test_outputs_in_dataclasses_are_compared() -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Output:
            return Output(self.bn(self.conv(x)))

    model = randomize(Gives(), (8, 3, 8, 8))
    folded = reparameterize(model, torch.rand(2, 3, 8, 8))
    assert verify(model, folded, (3, 8, 8)).ok
    assert not verify(model, one_element_off(folded, 0), (3, 8, 8)).ok


def test_another_default_device_changes_nothing() -> None:
    """As after `torch.set_default_device("cuda")`; the meta device stands for it."""
    model = small()
    with torch.device("meta"):
        folded = reparameterize(model)
        assert verify(model, folded, (3, 32, 32)).ok
