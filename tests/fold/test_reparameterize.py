"""reparameterize.py: whole networks, of timm and torchvision too, always on random batch-norm statistics."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from folding import EXACT, SMALL, SUBCLASS, MyBranches, assert_folds_exactly, conv, outputs, report_of, small
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import repvgg, with_bn
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import Member
from repvgg.models.repvgg import RepVGG


@pytest.mark.parametrize("name", ["efficientnet_b0", pytest.param("resnet18", marks=pytest.mark.slow)])  # more: test_baselines.py
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
    left = report.left["features.denseblock1.denselayer2.norm1"]
    assert left == "`cat` comes before it, and the activation of a BatchNormAct2d comes after it"
    norms = {path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    taken = {name for names in report.stretches.values() for name in names}
    assert norms == report.left.keys() | (norms & taken)
    assert not report.left.keys() & taken


def test_a_module_used_twice_is_folded_once_and_stays_one() -> None:
    block = repvgg(4, 4)
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.ReLU(), block), SMALL)
    assert assert_folds_exactly(model, SMALL).blocks == ["1"]
    folded = reparameterize(model)
    assert folded.get_submodule("1") is folded.get_submodule("3")


def test_trap_04_squeeze_excite_stays() -> None:
    model = randomize(RepVGG(Member((1, 2, 1, 1), 0.5, 0.5, squeeze_excite=True), 10, width=0.5).double())
    folded = reparameterize(model)
    before, after = ({n: p for n, p in m.state_dict().items() if ".se." in n} for m in (model, folded))
    assert len(before) == 6 * 4
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(outputs(folded, x), outputs(model, x)) <= rounding(model, x)


def test_trap_04_sync_batch_norm() -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(repvgg(4, 4), (8, 4, 6, 6)))  # it trains on no CPU
    pair = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(with_bn(nn.Conv2d(4, 5, 3)), (8, 4, 6, 6)))
    report = assert_folds_exactly(nn.Sequential(block, pair), (2, 4, 6, 6))
    assert (report.blocks, report.pairs, report.left) == (["0"], [("1.conv", "1.bn")], {})


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
    assert (report.blocks, report.stretches, report.left) == (["0.0", "1"], {"0.1": ["0.1", "0.2", "1"]}, {})


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


def test_a_folded_kernel_that_does_not_fit_its_dtype_is_refused_by_name() -> None:
    for model, path in ((nn.Sequential(repvgg(3, 4)), "0"), (with_bn(nn.Conv2d(3, 4, 3)), "conv")):
        model = model.eval().half()
        for bn in model.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.running_var.fill_(1e-6)  # type: ignore[union-attr]
                nn.init.constant_(bn.weight, 6e4)
        with pytest.raises(ReparamError, match=rf"^{path}: the folded weight does not fit torch\.float16"):
            reparameterize(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variance", [0.0, 1e-9])  # float16 knows no 1e-9
def test_a_channel_that_never_varied_folds(variance: float, dtype: torch.dtype) -> None:
    model = randomize(nn.Sequential(repvgg(4, 4), nn.ReLU(), with_bn(nn.Conv2d(4, 4, 3))), (8, 4, 8, 8))
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_var[1] = variance  # type: ignore[index]
    model = model.to(dtype)
    assert verify(model, reparameterize(model), (4, 8, 8)).ok


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
            self.last = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.plain(self.alone(self.up(self.pair(self.anything(x))))).relu())
            return out

    report = assert_folds_exactly(randomize(Net(), (8, 3, 17, 17)), (2, 3, 17, 17))
    assert report.blocks == ["anything.deep.inside"]
    assert report.stretches == {"pair.conv": ["pair.conv", "pair.bn"], "plain": ["alone", "plain"]}
    assert report.left == {"last": "`relu` comes before it, and it is read from outside"}
    assert report.errors.keys() == {"anything.deep.inside", "pair.conv", "plain"}
    assert max(report.errors.values()) <= EXACT
    first, *_, last = str(report).splitlines()
    assert first.startswith("folded 1 blocks, 2 conv+BN pairs and 0 other stretches; largest error of a part ")
    assert last == "left last: `relu` comes before it, and it is read from outside"


class Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x).relu()
        return out


def test_trap_15_a_stranger_s_branches_are_no_block_and_its_forward_is_read() -> None:
    report = assert_folds_exactly(
        randomize(nn.Sequential(MyBranches(a=with_bn(conv()), b=nn.BatchNorm2d(4))), (8, 4, 6, 6)), (2, 4, 6, 6)
    )
    assert report.blocks == []
    assert report.stretches == {"0.a": ["0.a.conv", "0.a.bn", "0.b", "0.add"]}
    assert report.left == {"0": "MyBranches " + SUBCLASS.format("Branches")}


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
        block.get_submodule("conv_1x1.bn").running_var[0] = -1  # type: ignore[index, operator]
    with pytest.raises(ReparamError, match=r"^conv_1x1\.bn\.running_var: is -1"):
        reparameterize(block)
    bare = nn.Conv2d(3, 4, 3).eval()
    assert (
        str(report_of(reparameterize(bare)))
        == "folded 0 blocks, 0 conv+BN pairs and 0 other stretches; largest error of a part 0.0e+00"
    )


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
