"""torch_write.py: branches of strangers' forwards become one convolution, however they are written."""

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from folding import SMALL, Siblings, assert_folds_exactly, report_of
from rounding import REPORTED
from torch import Tensor, nn

from repvgg.fold.blocks import with_bn
from repvgg.fold.call import Call
from repvgg.fold.reparameterize import _fold, reparameterize


class Official(nn.Module):
    """The official code's block: branches in attributes, an identity that may be None."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.rbr_identity: nn.Module | None = nn.BatchNorm2d(channels)
        self.rbr_dense = with_bn(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.rbr_1x1 = with_bn(nn.Conv2d(channels, channels, 1, bias=False))
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))  # type: ignore[no-any-return, operator]
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        out: Tensor = self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))
        return out


class InPlace(Official):
    """As MobileOne's: a running sum over a list."""

    def forward(self, inputs: Tensor) -> Tensor:
        out: Any = 0
        for branch in (self.rbr_identity, self.rbr_dense, self.rbr_1x1):
            assert branch is not None
            out += branch(inputs)
        return self.nonlinearity(out)  # type: ignore[no-any-return]


class Summed(Official):
    """YOLOv7's RepConv and others: `sum`, a scale for each channel, a residual around everything, a dropout."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.randn(channels))
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        branches = [self.rbr_dense(inputs), self.rbr_1x1(inputs), self.rbr_identity(inputs)]  # type: ignore[misc]
        return (inputs - self.gamma.view(1, -1, 1, 1) * self.drop(sum(branches))).relu()  # type: ignore[no-any-return]


class Functional(Official):
    """By functions, with the parameters of its modules; padded before."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        y = F.conv2d(F.pad(inputs, [1, 1, 1, 1]), self.weight * 2)
        return F.relu(y + self.rbr_1x1(inputs))


BLOCK = (8, 4, 8, 8)


@pytest.mark.parametrize("block", [Official, InPlace, Summed, Functional])
def test_branches_of_strangers_become_one_convolution(block: type[Official]) -> None:
    model = randomize(nn.Sequential(block(), nn.Conv2d(4, 4, 1), nn.ReLU(), block()), BLOCK)
    report = assert_folds_exactly(model, (2, 4, 9, 7))
    assert report.left == {}
    folded = reparameterize(model)
    assert [type(m) for m in folded.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] == [nn.Conv2d] * 3
    assert all(name.startswith(("0.", "1", "2", "3.")) for name, _ in folded.named_parameters())


@pytest.mark.parametrize("block", [Official, Summed])
def test_the_result_is_a_module_like_any_other(block: type[Official]) -> None:
    model = randomize(nn.Sequential(block(), block()), BLOCK)
    model[0].note = "kept"  # type: ignore[assignment]
    folded: Any = reparameterize(model)
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad():
        wanted = folded(x)
        copies = [copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), torch.jit.trace(folded, x)]
        for other in (*copies, torch.export.export(folded, (x,)).module(), torch.compile(folded, backend="eager")):
            assert torch.equal(other(x), wanted)
        assert folded.half()(x.half()).dtype == torch.float16
    assert (folded[0].note, copies[0][0].note) == ("kept", "kept")
    assert not any(m.training for m in copies[0].modules())
    again = reparameterize(folded.float())
    assert report_of(again).stretches == {}


def test_a_block_held_in_two_places_is_folded_in_both() -> None:
    block = Official()
    model = randomize(nn.Sequential(block, nn.Sequential(block), nn.Conv2d(4, 3, 1)), BLOCK)
    assert assert_folds_exactly(model, BLOCK).left == {}
    folded: Any = reparameterize(model)
    assert folded[0] is folded[1][0]


def test_a_batch_norm_before_a_convolution_goes_into_it_across_modules() -> None:
    class Mixer(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.mlp = nn.Sequential(
                OrderedDict(fc1=nn.Conv2d(4, 8, size, padding=size // 2), act=nn.ReLU(), fc2=nn.Conv2d(8, 4, 1))
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.mlp(self.norm(x))
            return out

    report = assert_folds_exactly(randomize(nn.Sequential(nn.ReLU(), Mixer(1), Mixer(3)), BLOCK), BLOCK)
    assert report.stretches == {"1.mlp.fc1": ["1.norm", "1.mlp.fc1"]}
    assert report.left == {"2.norm": "`add` comes before it, and a shift would cross the border of a padded 3x3"}


def test_a_batch_norm_of_a_concatenation_falls_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 5, 5, padding=2), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.split(x, [2, 2], 1)
            return self.bn(torch.cat([self.a(a), self.b(b)], 1)).relu()  # type: ignore[no-any-return]

    model = randomize(Mixed(), BLOCK)
    report = assert_folds_exactly(model, BLOCK)
    assert set(report.stretches) == {"a", "b"}
    assert type(reparameterize(model)) is Mixed  # type: ignore[comparison-overlap]


class Heads(nn.Module):
    """A convolution with its batch norm, read by two others."""

    def __init__(self, width: int = 8, kernel: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width)
        self.a, self.b = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.cat([self.a(y).relu(), self.b(y).sigmoid()], 1)


@pytest.mark.parametrize(("width", "kernel"), [(8, 3), (24, 1), (64, 1)])
def test_a_convolution_is_folded_into_one_reader_or_into_none(width: int, kernel: int) -> None:
    report = assert_folds_exactly(randomize(Heads(width, kernel), SMALL), SMALL)
    assert report.stretches == {"conv": ["conv", "bn"]}
    assert report.left == {}


class Concatenated(nn.Module):
    """A batch norm of a concatenation, in a forward that may do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        y: Tensor = self.bn(torch.cat([self.a(x), self.b(x)], 1))
        return y if features else y.relu()


class Changing(Concatenated):
    """What both convolutions read is changed between them."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x * 1
        a = self.a(x)
        b = self.b(x.relu_())
        return self.bn(torch.cat([a, b], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Concatenated, Changing])
def test_a_batch_norm_whose_parts_cannot_all_be_folded_stays_whole(make: type[nn.Module]) -> None:
    report = assert_folds_exactly(randomize(make(), SMALL), SMALL)
    assert report.stretches == {}
    assert report.left.keys() == {"bn"}


@torch.no_grad()
def test_of_a_batch_norm_that_falls_apart_all_parts_are_folded_or_none() -> None:
    """As the search for the part that makes a whole network differ asks for some of them."""
    model = randomize(Concatenated(), SMALL).double()
    call, x = Call.by_example((torch.zeros(SMALL),)), torch.randn(SMALL, dtype=torch.float64)
    for chosen in (None, {"a", "b"}, {"a"}, set[str]()):
        folded, report = _fold(model, call, None if chosen is None else frozenset(chosen))
        assert len(report.stretches) == (2 if chosen is None or len(chosen) == 2 else 0)
        assert relative_error(folded(x), model(x)) < 1e-12


def test_what_is_changed_in_place_is_not_read_later() -> None:
    class Late(Siblings):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sigmoid()
            a = self.conv(x)
            x.sub_(0.5).relu_()
            out: Tensor = self.bn(a) + self.other(x)
            return out

    report = assert_folds_exactly(randomize(Late(), SMALL), SMALL)
    assert report.left["bn"].startswith("what it reads is changed in place")


def test_hooks_on_a_container_see_what_they_saw() -> None:
    """What a hooked module gives must stay; inside it, folding goes on."""
    model = randomize(
        nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)), BLOCK
    )
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(BLOCK, dtype=torch.float64)
    with torch.no_grad():
        model.double()(x)
        folded = reparameterize(model)
        folded(x)
    assert float((seen[0] - seen[1]).abs().max()) < 1e-12
    assert "1" in report_of(folded).left


def test_a_detector_s_way_of_calling_is_followed() -> None:
    """As ultralytics does: a root that asks whether it was given a dictionary, a list of layers, a list of chunks."""

    class C2f(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.m = (
                with_bn(nn.Conv2d(4, 4, 1)),
                nn.ModuleList([with_bn(nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2)]),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.cv1(x).relu().chunk(2, 1))
            y.extend(m(y[-1]).relu() for m in self.m)
            return torch.cat(y, 1)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleList([C2f(), nn.Conv2d(8, 4, 1)])

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, dict):
                return self.loss(x)  # type: ignore[operator]
            for m in self.model:
                x = m(x)
            return x

    report = assert_folds_exactly(randomize(Root(), BLOCK), BLOCK)
    assert len(report.pairs) == 3
    assert report.left == {}


def test_a_slice_beyond_the_last_channel_is_left() -> None:
    """Python takes what there is."""

    class Beyond(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)[:, :100]).relu()  # type: ignore[no-any-return]

    assert assert_folds_exactly(randomize(Beyond(), SMALL), SMALL).left.keys() == {"bn"}


class TwoOutputs(Siblings):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)), x.sigmoid()


class KeepsOne(Siblings):
    seen: Any = None

    def forward(self, x: Tensor) -> Any:
        self.seen = x.sigmoid()
        return self.bn(self.conv(x))


@pytest.mark.parametrize("child", [TwoOutputs, KeepsOne])
def test_a_child_that_does_something_else_besides_stays(child: type[Siblings]) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = child(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            out = self.child(x.relu())
            y, other = out if child is TwoOutputs else (out, self.child.seen)
            return y * 2 + other if child is TwoOutputs else y * 2  # type: ignore[no-any-return]

    model = randomize(Parent(), SMALL)
    assert_folds_exactly(model, SMALL)
    folded: Any = reparameterize(model)
    folded(torch.randn(SMALL, dtype=torch.float64))
    assert child is TwoOutputs or folded.child.seen is not None


class Part(Siblings):
    """Answers otherwise if it is asked to; its caller hands that down."""

    def forward(self, x: Tensor, full: bool = True) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if full else y  # type: ignore[no-any-return]


def test_a_flag_that_is_handed_down_stays_open() -> None:
    """In whatever form."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: Tensor, raw: bool = False) -> Tensor:
            return self.part(x, full=not raw).relu()  # type: ignore[no-any-return]

    model, x = randomize(Net(), SMALL).double(), torch.randn(SMALL, dtype=torch.float64)
    folded = reparameterize(model)
    assert "`full`" in report_of(folded).left["part.bn"]
    for raw in (False, True):
        assert torch.equal(folded(x, raw=raw), model(x, raw=raw))
    assert report_of(reparameterize(model, (x,))).left == {}


class Twice(Siblings):
    """Does something besides its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2  # type: ignore[no-any-return]


def test_what_the_call_of_a_child_does_besides_is_done_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre = Twice(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.block = Official()

        def forward(self, x: Tensor) -> Tensor:
            return plain_sum(self.block, self.pre(x))

    assert_folds_exactly(randomize(Net(), SMALL), SMALL)


def with_autocast(block: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return plain_sum(block, x)


def with_the_autocast_of_its_device(block: Any, x: Tensor) -> Tensor:
    with torch.autocast(device_type=x.device.type, enabled=False):
        return plain_sum(block, x)


@torch.no_grad()
def without_gradients(block: Any, x: Tensor) -> Tensor:
    return plain_sum(block, x)


def plain_sum(block: Any, x: Tensor) -> Tensor:
    return block.rbr_dense(x) + block.rbr_1x1(x) + block.rbr_identity(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("how", [with_autocast, with_the_autocast_of_its_device, without_gradients])
def test_a_context_that_a_forward_works_under_is_not_lost(how: Any, below: bool) -> None:
    """Its pairs fold; it is not written anew, which would lose the context."""

    class Under(Official):
        def forward(self, inputs: Tensor) -> Tensor:
            return how(self, inputs)  # type: ignore[no-any-return]

    block = nn.Sequential(Under(), nn.ReLU()) if below else Under()
    model = randomize(block, BLOCK)
    folded = reparameterize(model)
    assert len(report_of(folded).pairs) == 2
    assert len(report_of(folded).stretches) == 2
    x = torch.randn(BLOCK)
    assert relative_error(folded(x), model(x)) <= REPORTED
    if how is without_gradients:
        assert not folded(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert folded(x).dtype == model(x).dtype
    assert torch.no_grad.__enter__.__module__ == "torch.autograd.grad_mode"


def test_what_is_frozen_stays_frozen() -> None:
    model = randomize(nn.Sequential(Official(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), BLOCK)
    model[0].requires_grad_(False)
    folded = reparameterize(model)
    assert not any(p.requires_grad for p in folded[0].parameters())  # type: ignore[index]
    assert all(p.requires_grad for p in folded[1].parameters())  # type: ignore[index]
