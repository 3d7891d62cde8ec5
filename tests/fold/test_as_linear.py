"""as_linear.py: readers, kernels and gradients, what authors may add, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from folding import SMALL, SUBCLASS, MyBranches, MyConv, MyNorm, MySequential, assert_folds_exactly, conv, folds, small
from rounding import rounding
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, Pair, ReparamError, add, identity
from repvgg.fold.as_linear import Branches, as_linear, equivalent_kernel, is_foldable
from repvgg.fold.blocks import repvgg, with_bn
from repvgg.fold.reparameterize import reparameterize


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


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_trap_04_grouped_identity_kernels(groups: int) -> None:
    block = repvgg(8, 8, groups=groups)
    folds(block, (2, 8, 6, 6))
    assert reparameterize(block).groups == groups


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


@pytest.mark.parametrize("padding", [1, "same", (1, 1)])
def test_trap_04_convolutions_with_bias(padding: Any) -> None:
    conv3, conv1 = nn.Conv2d(4, 4, 3, padding=padding), nn.Conv2d(4, 4, 1, padding="valid")
    folds(Branches(a=with_bn(conv3), b=with_bn(conv1), c=nn.Conv2d(4, 4, 1)), (2, 4, 6, 6))


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
    assert report.stretches == {"3": ["2", "3"]}  # what is registered is read outside blocks too
    assert not report.left
    assert type(reparameterize(model).get_submodule("2")) is nn.Identity
    with torch.no_grad():
        model.get_submodule("3.a.conv.bn").running_var[0] = -1  # type: ignore[index, operator]
    with pytest.raises(ReparamError, match=r"^3\.a\.conv\.bn\.running_var: is -1"):
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
    assert not report.blocks
    assert report.stretches == {"0.conv": ["0.conv.conv", "0.conv.bn", "0.mul", "0.add"]}  # its forward says what it computes
    assert type(reparameterize(model).get_submodule("1")) is DropPath  # in no stretch: it stays


def test_what_fits_any_number_of_channels_asks_for_it() -> None:
    for module in (nn.Identity(), nn.Dropout(), nn.Sequential(), nn.AvgPool2d(2), Branches(a=nn.Identity())):
        with pytest.raises(ReparamError, match=r"fits any number of channels: pass as_linear\(module, channels\)"):
            as_linear(module.eval())
        assert as_linear(module, 4).in_channels == 4
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    for pool in (nn.AvgPool2d(2), nn.AvgPool2d((3, 2), (1, 2), (1, 0)), nn.AvgPool2d(3, 2, 1, divisor_override=5)):
        assert relative_error(as_linear(pool.eval(), 4)(x), pool(x)) <= rounding(pool, x)


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
