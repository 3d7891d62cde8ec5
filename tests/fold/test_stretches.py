"""stretches.py and torch_*.py: what forwards do with modules folds, however it is written; the rest is left, with its reason."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from folding import SMALL, MyConv, MyNorm, Siblings, assert_folds_exactly, folds, report_of
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import Branches, as_linear
from repvgg.fold.blocks import with_bn
from repvgg.fold.reparameterize import reparameterize


class OutputUsedTwice(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn(y) + y.relu()
        return out


class CalledTwice(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)) + self.conv(x * 2)
        return out


class WeightUsedByHand(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)  # type: ignore[arg-type]
        return out


class Between(Siblings):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x).relu())
        return out


class Twisted(Siblings):
    """Branches on a value: its forward cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 0:
            x = x * 2
        out: Tensor = self.bn(x)
        return out


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)])
        self.bns = nn.ModuleDict({"0": nn.BatchNorm2d(4), "1": nn.BatchNorm2d(4), "last": nn.BatchNorm2d(4)})

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = self.bns[str(i)](conv(x)).relu()
        out: Tensor = self.bns["last"](x)
        return out


class OneConvTwoHomes(nn.Module):
    """One convolution, used with its batch norm in one place and without in another."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3)
        self.bare = nn.Sequential(conv, nn.ReLU())
        self.normed = nn.Sequential(conv, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bare(x) + self.normed(x)
        return out


class SharedWithTheUntraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3)
        self.hidden = Untraceable(conv)
        self.normed = nn.Sequential(conv, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hidden(x) + self.normed(x)
        return out


class Untraceable(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x if x.sum() > 0 else -x)
        return out


class Reaches(nn.Module):
    """Calls into a child's parts, past the child's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = with_bn(nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem(x) + self.stem.conv(x)  # type: ignore[operator]
        return out


class SharedBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.a(x)) + self.bn(self.b(x))
        return out


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OutputUsedTwice, "`relu` reads what comes before it too, and `add` comes after it"),
        (Between, "`relu` comes before it, and it is read from outside"),
        (CalledTwice, "its Conv2d is used in more than one place"),
        (WeightUsedByHand, "its Conv2d is used in more than one place"),
        (OneConvTwoHomes, "its Conv2d is used in more than one place"),
        (SharedWithTheUntraceable, "its Conv2d is used in more than one place"),
        (Reaches, "its Conv2d is used in more than one place"),
        (SharedBatchNorm, "its BatchNorm2d is used in more than one place"),
        (Twisted, "Twisted cannot be traced (symbolically traced variables cannot be used as inputs to control flow)"),
        (lambda: Siblings(nn.Conv2d(3, 4, 4, padding="same")), 'its Conv2d with padding="same" and an even kernel'),
        (lambda: Siblings(norm=nn.BatchNorm2d(4, track_running_stats=False)), "its BatchNorm2d has no running statistics"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_is_no_pair_is_left_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = randomize(make(), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == []
    (left,) = report.left.values()
    assert left.startswith(reason)
    assert reason in str(report)


def test_siblings_in_lists_and_dictionaries() -> None:
    report = assert_folds_exactly(randomize(Lists(), SMALL), SMALL)
    assert report.pairs == [("convs.0", "bns.0"), ("convs.1", "bns.1")]
    assert report.left == {"bns.last": "`relu` comes before it, and it is read from outside"}


def test_a_pair_inside_something_untraceable_still_folds() -> None:
    model = randomize(nn.Sequential(Siblings(), Twisted(nn.Conv2d(4, 4, 1))), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == [("0.conv", "0.bn")]
    assert report.left == {"1.bn": "1 cannot be traced (symbolically traced variables cannot be used as inputs to control flow)"}


def test_a_whole_pair_used_twice_is_folded() -> None:
    pair = with_bn(nn.Conv2d(3, 3, 3, padding=1))
    assert assert_folds_exactly(randomize(nn.Sequential(pair, nn.ReLU(), nn.Sequential(pair)), SMALL), SMALL).pairs == [
        ("0.conv", "0.bn")
    ]


def test_tied_weights() -> None:
    a, b, bare = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
    bare.weight = b.weight = a.weight
    report = assert_folds_exactly(randomize(nn.Sequential(with_bn(a), with_bn(b), bare), SMALL), SMALL)
    assert report.pairs == [("0.conv", "0.bn"), ("1.conv", "1.bn")]


def test_a_forward_that_stores_what_it_sees_stays_clean() -> None:
    class Stores(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x)

    folded = reparameterize(Stores().eval())
    assert report_of(folded).pairs == [("conv", "bn")]
    assert "seen" not in vars(folded)


def test_a_batch_norm_held_by_another_way_is_refused() -> None:
    class Alias(Siblings):
        def __init__(self) -> None:
            super().__init__()
            self.norms = [self.bn]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norms[0](self.conv(x))
            return out

    with pytest.raises(ReparamError, match=r"^1: uses a folded module in another way"):
        reparameterize(nn.Sequential(nn.ReLU(), Alias()).eval())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Siblings(MyConv(3, 4, 3)), "`abs` comes before it"),  # its own forward is read
        (lambda: Siblings(norm=MyNorm(4)), "its MyNorm is a subclass of BatchNorm2d"),
        (
            lambda: Siblings(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
            "its ParametrizedConv2d is parametrised: call",
        ),
        (
            lambda: Siblings(nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 4, 3))),
            "its ParametrizedConv2d is parametrised: call",
        ),
    ],
)
def test_trap_15_strangers_are_left(make: Callable[[], nn.Module], reason: str) -> None:
    report = assert_folds_exactly(randomize(make(), SMALL), SMALL)
    assert report.left["bn"].startswith(reason)
    assert not report.pairs


def test_trap_15_other_convolutions_of_timm() -> None:
    """Those whose kernel is a function of their parameters fold; one that pads by the size of the image is left."""
    layers = pytest.importorskip("timm.layers")
    for name in ("Conv2dSame", "StdConv2d", "ScaledStdConv2d"):
        model = randomize(nn.Sequential(getattr(layers, name)(3, 4, 3, stride=2), nn.BatchNorm2d(4)), SMALL)
        report = assert_folds_exactly(model, SMALL)
        assert report.left == ({"1": "a Conv2dSame comes before it, and it is read from outside"} if name == "Conv2dSame" else {})


def test_trap_15_batch_norm_act_keeps_its_activation() -> None:
    layers = pytest.importorskip("timm.layers")
    norm_act = layers.BatchNormAct2d
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), norm_act(4, act_layer=nn.SiLU), nn.Conv2d(4, 4, 1), norm_act(4, apply_act=False)), SMALL
    )
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == [("0", "1"), ("2", "3")]
    folded = reparameterize(model)
    assert [type(m) for m in folded.children()] == [nn.Conv2d, nn.SiLU, nn.Conv2d, nn.Identity]
    with pytest.raises(ReparamError, match=r"^a\.1: has an activation inside"):
        as_linear(Branches(a=model[:2]).eval())
    folds(Branches(a=model[2:]), (2, 4, 6, 6))


# ----------------------------------------------------------------------------------------------------- however it is written


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
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
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
    assert type(reparameterize(model)) is Mixed


def test_what_is_changed_in_place_is_not_read_later() -> None:
    class Late(Siblings):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            a = self.conv(x)
            x.relu_()
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
