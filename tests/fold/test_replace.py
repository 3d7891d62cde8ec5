"""replace.py: any network keeps its function when blocks go in, and again when they come out."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from rounding import rounding
from torch import Tensor, nn

import repvgg
from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import BLOCKS, UNFOLDABLE, with_bn
from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.replace import ReplaceReport, replace_conv
from repvgg.models.repvgg import RepVGG

FOLDABLE = [name for name in BLOCKS if name not in UNFOLDABLE]
# An identity without batch norm cannot be silent, and a batch norm before the sum makes the rest another.
NEW_IN_TRAIN_MODE = ("identity_no_bn", "qarepvgg")


def report(model: nn.Module) -> ReplaceReport:
    found = model.replace_report
    assert isinstance(found, ReplaceReport)
    return found


def timm_model(name: str) -> nn.Module:
    model: nn.Module = pytest.importorskip("timm").create_model(name, num_classes=10)
    return model


def deeplab_head() -> nn.Module:
    module = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    head: nn.Module = module.DeepLabHead(16, 5)
    return head


@pytest.mark.parametrize(
    ("make", "shape", "replaced"),
    [
        pytest.param(lambda: timm_model("resnet18"), (2, 3, 64, 64), 16, marks=pytest.mark.slow),
        pytest.param(lambda: timm_model("resnet50"), (2, 3, 64, 64), 16, marks=pytest.mark.slow),
        (lambda: timm_model("mobilenetv3_small_100"), (2, 3, 64, 64), 4),  # the stem and three depthwise ones
        pytest.param(deeplab_head, (2, 16, 24, 24), 4, marks=pytest.mark.slow),  # three of them dilated by 12, 24 and 36
    ],
    ids=["resnet18", "resnet50", "mobilenetv3", "deeplab head"],
)
def test_networks_of_others(make: Callable[[], nn.Module], shape: tuple[int, ...], replaced: int) -> None:
    model = randomize(make().double(), (4, *shape[1:]))
    x = torch.randn(*shape, dtype=torch.float64)
    with_blocks = replace_conv(model)
    folded = reparameterize(with_blocks)
    with torch.no_grad():
        before, between, after = model(x), with_blocks(x), folded(x)
    assert relative_error(between, before) <= rounding(model, x)
    assert relative_error(after, between) <= rounding(with_blocks, x)
    assert len(report(with_blocks).replaced) == len(report(with_blocks).norms) == replaced
    assert folded.fold_report.blocks == report(with_blocks).replaced  # type: ignore[union-attr]
    assert not any(isinstance(m, Branches) for m in folded.modules())
    convolutions = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions == {*report(with_blocks).replaced, *report(with_blocks).left}
    kernels = {path: model.get_submodule(path).kernel_size for path in report(with_blocks).left}
    assert report(with_blocks).left == {path: f"is {rows}x{columns}" for path, (rows, columns) in kernels.items()}  # type: ignore


def small() -> nn.Sequential:
    """A pair with bias and padding mode, a grouped strided pair, a depthwise one, a dilated conv alone, and a 5x5."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8, eps=1e-3, momentum=0.2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2),
        nn.Conv2d(6, 6, 5, padding=2),
    )


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model)(x)
    return out


@pytest.mark.parametrize("block", FOLDABLE)
def test_every_block_in_both_modes(block: str) -> None:
    model = randomize(small().double(), (8, 3, 12, 12))
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    replaced = replace_conv(model, block)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())  # a copy was changed
    assert relative_error(outputs(replaced, x), outputs(model, x)) <= rounding(replaced, x)
    assert relative_error(outputs(reparameterize(replaced), x), outputs(model, x)) <= rounding(replaced, x)
    wanted = {"10": "is 5x5"}
    if block == "dbb":
        wanted = {"9": "the block dbb has an average pool, which knows no dilation: choose another block here", **wanted}
    assert report(replaced).left == wanted
    assert report(replaced).norms == ["1", "4", "7"]
    before_the_lone_one = slice(0, 9)
    in_training = [outputs(m.train()[before_the_lone_one], x) for m in (model, replaced)]  # type: ignore[union-attr, index]
    allowed = rounding(model[before_the_lone_one], x)  # type: ignore[index]
    assert (relative_error(in_training[1], in_training[0]) <= allowed) == (block not in NEW_IN_TRAIN_MODE)


def test_statistics_go_on_as_they_would_have() -> None:
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=0.3)), (8, 3, 6, 6)
    ).train()
    replaced = replace_conv(model)
    x = torch.randn(8, 3, 6, 6)
    for m in (model, replaced):
        m(x)
    old, new = model.get_submodule("1"), replaced.get_submodule("0.conv_kxk.bn")
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name


def test_the_branches_that_begin_silent_learn() -> None:
    model = replace_conv(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.randn(8, 4, 6, 6)) * torch.randn(8, 4, 6, 6)).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_zero_weights_of_a_batch_norm_are_no_obstacle() -> None:
    """timm starts the last batch norm of each residual block at zero."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double().eval()
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    nn.init.normal_(model[1].bias)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for block in FOLDABLE:
        replaced = replace_conv(model, block)
        for other in (replaced, reparameterize(replaced)):
            assert relative_error(other(x), model(x)) <= rounding(replaced, x), block


def test_dtype_format_mode_and_frozenness_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).to(
        torch.bfloat16,
        memory_format=torch.channels_last,  # type: ignore[call-overload]
    )
    model[0].requires_grad_(False)
    model[2].eval()
    replaced = replace_conv(model)
    assert {p.dtype for p in replaced.parameters()} == {torch.bfloat16}
    assert replaced.get_submodule("0.conv_kxk.conv").weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore
    assert [p.requires_grad for p in replaced.parameters()] == [False] * 8 + [True] * 8
    assert [replaced.get_submodule(i).training for i in "02"] == [True, False]


class Subclass(nn.Conv2d):
    pass


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3), "pads by 0, where a block pads by its dilation, 1"),
        (nn.Conv2d(4, 4, 3, padding=1, dilation=2), "pads by 1, where a block pads by its dilation, 2"),
        (nn.Conv2d(4, 4, 3, (1, 2), 1), "has one stride or dilation down and another across"),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "is 1x3"),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), "is a ConvTranspose2d"),
        (
            Subclass(4, 4, 3, padding=1),
            "Subclass is a subclass of Conv2d and may compute something else: as_linear.register says what",
        ),
        (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), "remove_parametrizations"),
        (hooked(), "carries forward hooks"),
    ],
)
def test_what_cannot_be_replaced_is_reported(conv: nn.Module, reason: str) -> None:
    replaced = replace_conv(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), conv))
    assert report(replaced).replaced == ["0"]
    assert reason in report(replaced).left["1"]
    assert f"left 1: {report(replaced).left['1']}" in str(report(replaced))
    assert str(report(replaced)).startswith("replaced 1 convolutions, 0 of them with their batch norm\n")


class Borrower(nn.Module):
    """Uses its convolution's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.mean()  # type: ignore[no-any-return]


def test_shared_and_borrowed_convolutions_are_left() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert report(replace_conv(nn.Sequential(conv, conv))).left == {"0": "is used in more than one place"}
    assert report(replace_conv(Borrower())).left == {"conv": "is used in more than one place"}


def test_a_convolution_reached_by_another_way_is_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.known = [self.conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.known[0](x)  # type: ignore[no-any-return]

    with pytest.raises(ReparamError, match="inner: uses a replaced module in another way"):
        replace_conv(nn.Sequential(OrderedDict(inner=Holder())))


class CalledByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(input=x)).relu()  # type: ignore[no-any-return]


class ReadsItsWeight(CalledByKeyword):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.to(self.conv.weight.dtype))).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("parent", "reason"),
    [(CalledByKeyword, "calls it with more than its input"), (ReadsItsWeight, "is used in more than one place")],
)
def test_a_parent_that_needs_a_convolution_keeps_it(parent: type[nn.Module], reason: str) -> None:
    model = randomize(nn.Sequential(parent(), nn.Conv2d(4, 4, 3, padding=1)), (8, 4, 8, 8))
    replaced = replace_conv(model)
    assert replaced.replace_report.replaced == ["1"]  # type: ignore[union-attr]
    assert reason in replaced.replace_report.left["0.conv"]  # type: ignore[union-attr, index]
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert relative_error(replaced(x), model(x)) <= rounding(model, x)
    replaced.train()(x).sum().backward()


def test_frozen_batch_norm_stays_outside() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), ops.FrozenBatchNorm2d(4)).double().eval()
    model[1].running_mean.normal_()  # type: ignore[operator, union-attr]
    replaced = replace_conv(model)
    assert report(replaced).replaced == ["0"]
    assert report(replaced).norms == []
    assert type(replaced.get_submodule("1")) is ops.FrozenBatchNorm2d
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert relative_error(replaced(x), model(x)) <= rounding(replaced, x)


def test_blocks_that_are_there_stay() -> None:
    model = nn.Sequential(repvgg.create_model("repvgg_micro", width=0.25).stem, with_bn(nn.Conv2d(8, 4, 3, padding=1)))  # type: ignore
    replaced = replace_conv(model)
    assert report(replaced).replaced == ["1.conv"]
    assert set(report(replaced).left.values()) == {"is part of a block that folds"}
    again = replace_conv(replaced)
    assert report(again).replaced == []


def test_a_deploy_form_of_ours_becomes_a_training_form_again() -> None:
    model = randomize(repvgg.create_model("repvgg_micro", num_classes=10, width=0.25).double())
    deploy = reparameterize(model)
    again = replace_conv(deploy)
    assert isinstance(again, RepVGG)
    assert again.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(again(x), model(x)) <= rounding(again, x)
    with pytest.raises(ValueError, match=r"was not made by repvgg.create_model"):  # it holds what no manifest of ours says
        repvgg.save(again, "nowhere.safetensors")


def test_a_convolution_alone_is_a_network_too() -> None:
    assert type(replace_conv(nn.Conv2d(4, 4, 3, padding=1))) is Branches


def test_fresh_blocks_start_as_they_are_initialised() -> None:
    model = small()
    replaced = replace_conv(model, "repvgg", fresh=True)
    norms = [m for m in replaced.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 + 2 + 3 + 2
    assert all((m.weight == 1).all() for m in norms)
    ones = torch.ones(1, 3, 9, 9)
    assert relative_error(outputs(replaced.eval(), ones), outputs(model.eval(), ones)) > 0.01
    assert len([m for m in replace_conv(model, "relu_in_branch", fresh=True).modules() if isinstance(m, nn.ReLU)]) > 8


@pytest.mark.parametrize(
    ("block", "spoil", "reason"),
    [
        ("acme", lambda m: None, "no block 'acme': there are repvgg, plain"),
        ("relu_in_branch", lambda m: None, r"^0\.conv_kxk\.relu: ReLU is not known to be linear"),
        ("repvgg", lambda m: m[0].weight.data.fill_(float("nan")), "^0.weight: holds NaN or Inf"),
        ("repvgg", lambda m: m[1].running_var.fill_(-1), "^0.*running_var.* is -1 in channel 0"),
    ],
)
def test_refusals(block: str, spoil: Callable[[Any], Any], reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    spoil(model)
    with pytest.raises(ValueError, match=reason):
        replace_conv(model, block)


# The deploy form without blocks, which has the same file, is quick in test_load.py: test_comparators_there_and_back.
@pytest.mark.parametrize("form", ["training", pytest.param("deploy", marks=pytest.mark.slow)])
def test_a_comparator_with_blocks_there_and_back(form: str, tmp_path: Any) -> None:
    pytest.importorskip("timm")
    model = repvgg.create_model("resnet18", num_classes=10, block="repvgg", deploy=form == "deploy").eval()
    repvgg.save(model, tmp_path / "a.safetensors")
    again = repvgg.load(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
    assert again.manifest.arch["block"] == "repvgg"  # type: ignore[union-attr, index]
    assert (form == "training") == any(isinstance(m, Branches) for m in again.modules())


def test_a_synchronised_batch_norm_stays_one() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(with_bn(nn.Conv2d(3, 3, 3, padding=1)), (4, 3, 8, 8)))
    norms = [type(m) for m in replace_conv(model).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms == [nn.SyncBatchNorm] * 3


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_was_frozen_stays_so(frozen: int) -> None:
    model = with_bn(nn.Conv2d(3, 3, 3, padding=1, bias=False))
    model[frozen].requires_grad_(False)
    for module in replace_conv(model).modules():
        for parameter in module.parameters(recurse=False):
            assert parameter.requires_grad == (frozen != isinstance(module, nn.BatchNorm2d))


def test_a_network_whose_forward_cannot_be_followed_says_what_to_give() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, images: Any) -> Any:
            return [self.backbone(image) for image in images]

    with pytest.warns(UserWarning, match=r"so nothing was replaced: .* model\.backbone = replace_conv\(model\.backbone\)"):
        replace_conv(Detector())
    assert "cannot be followed" in str(reparameterize(Detector().eval()).fold_report)
