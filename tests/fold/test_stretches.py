"""stretches.py: which parts of a forward fold, and which are left, with the reason."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from folding import SMALL, MyConv, MyNorm, Siblings, assert_folds_exactly, folds, outputs, report_of
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
        (Twisted, "its network goes 2 ways, which its input decides"),
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


def test_a_pair_beside_something_that_goes_two_ways_folds() -> None:
    model = randomize(nn.Sequential(Siblings(), Twisted(nn.Conv2d(4, 4, 1))), SMALL)
    report = assert_folds_exactly(model, SMALL)
    assert report.pairs == [("0.conv", "0.bn")]
    assert report.left == {"1.bn": "1 goes 2 ways, which its input decides"}


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


def test_numbers_that_cancel_fold_as_far_as_their_digits_go() -> None:
    """A bias that the batch norm takes away again: what is left of x + 1e6 - 1e6 has lost six digits, in the original."""
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double(), SMALL)
    x = torch.randn(SMALL).double()
    wanted = outputs(net, x)
    for scale, digits in ((1e6, 1e-8), (1e12, None)):
        far = copy.deepcopy(net)
        for tensor in (far[0].bias, far[1].running_mean):
            tensor.data.add_(scale)  # type: ignore[union-attr, operator]
        if digits:
            assert relative_error(outputs(reparameterize(far), x), wanted) <= digits
        else:
            with pytest.raises(ReparamError, match=r"its numbers cancel: they are up to \de\+1\d times as large.*running means"):
                reparameterize(far)


class Flat(nn.Module):
    """A batch norm and a linear layer on what `flatten` makes of a map."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.flatten = flatten
        self.bn, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.bn(self.flatten(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("flatten", "folds_it"),
    [
        (lambda x: x.mean((2, 3)), True),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), True),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), True),
        (lambda x: x.flatten(2), False),  # [N, 4, 4], where the layer runs along another dimension than the batch norm
        (lambda x: x.mean((2, 3), keepdim=True).squeeze(3).expand(-1, -1, 4), False),
    ],
)
def test_a_batch_norm_before_a_linear_layer(flatten: Callable[[Tensor], Tensor], folds_it: bool) -> None:
    torch.manual_seed(0)
    model = Flat(flatten)
    for name, t in model.bn.state_dict().items():
        if t.is_floating_point():
            t.uniform_(0.5, 1.5) if "var" in name else t.normal_()
    model.eval()
    x = torch.randn(2, 4, 2, 2)
    folded = reparameterize(model.double(), x.double())
    assert (type(folded.bn) is nn.Identity) == folds_it
    assert type(folded.fc) is nn.Linear
    assert relative_error(outputs(folded, x.double()), outputs(model, x.double())) < 1e-12


@pytest.mark.parametrize(
    ("conv", "norm", "shape"), [(nn.Conv1d, nn.BatchNorm1d, (2, 3, 9)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 5, 5))]
)
def test_batch_norms_of_one_and_three_dimensions_are_told_as_left(
    conv: type[nn.Module], norm: type[nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(conv(3, 4, 3), norm(4), nn.ReLU())  # type: ignore[call-arg]
    report = assert_folds_exactly(randomize(model, shape), shape)
    assert report.left == {"1": f"a {norm.__name__}: only those of maps [N, C, H, W] and of features [N, C] are folded"}
