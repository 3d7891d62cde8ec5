"""guards.py: train mode, damage, hooks and what cannot be copied are refused by name."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomize
from folding import SMALL, Siblings, assert_folds_exactly, conv, report_of, small
from torch import nn
from torch.nn.utils import prune

from repvgg.fold.algebra import ReparamError
from repvgg.fold.as_linear import Branches, as_linear
from repvgg.fold.blocks import repvgg
from repvgg.fold.guards import is_finite
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize


@pytest.mark.parametrize("path", ["", "stages", "stages.2.1.block.conv_1x1.bn", "stages.0.0.se"])
def test_trap_01_train_mode_is_refused(path: str) -> None:
    """Naming the first module in train mode."""
    model = small()
    model.get_submodule(path).training = True
    with pytest.raises(ReparamError, match=rf"^{path or 'RepVGG'}: is in train mode.*call \.eval\(\) first"):
        reparameterize(model)
    for a, b in ((model, small()), (small(), model)):
        with pytest.raises(ReparamError, match="is in train mode"):
            verify(a, b, (3, 32, 32))


class Wrapper(nn.Module):
    """As ultralytics' YOLO does: called with a picture's name, it predicts; the network is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def __call__(self, source: str) -> str:
        return source


class Session:
    """As a trainer of another library: no module at all."""

    def __init__(self) -> None:
        self.network = small()


@pytest.mark.parametrize(
    ("thing", "line"),
    [
        (Wrapper(), r"Wrapper is no network but holds one: pass that, as in reparameterize\(x\.model\.eval\(\)\)"),
        (Session(), r"Session is no network but holds one: pass that, as in reparameterize\(x\.network\.eval\(\)\)"),
        ("a0.safetensors", r"str is no network: reparameterize\(repvgg\.load\('a0\.safetensors'\)\) folds that of a file"),
        ({"stem.weight": torch.zeros(1)}, r"dict is no network: load it into one first"),
        (3, r"int is no network: pass a torch\.nn\.Module in eval mode"),
    ],
)
def test_what_is_no_network_is_told_what_to_pass(thing: Any, line: str) -> None:
    with pytest.raises(ReparamError, match=f"^{line}"):
        reparameterize(thing)


def test_trap_01_train_mode_is_refused_in_one_block() -> None:
    block = repvgg(4, 4).eval()
    block.get_submodule("conv_kxk.bn").train()
    with pytest.raises(ReparamError, match=r"^conv_kxk\.bn: is in train mode"):
        as_linear(block)
    with pytest.raises(ReparamError, match=r"^Dropout: is in train mode"):
        as_linear(nn.Dropout())


DAMAGE = [
    ("stages.1.0.block.conv_kxk.bn.running_var", -1e-9, "is -1e-09 in channel 1; a variance is not negative"),
    ("stages.1.0.block.conv_1x1.bn.running_var", -0.25, "is -0.25 in channel 1"),
    ("stages.2.1.block.identity.running_var", math.nan, "NaN or Inf"),
    ("stages.2.1.block.identity.running_mean", math.inf, "NaN or Inf"),
    ("stages.0.0.block.conv_kxk.conv.weight", math.nan, "NaN or Inf"),
    ("stem.block.conv_1x1.bn.weight", -math.inf, "NaN or Inf"),
    ("head.weight", math.nan, "NaN or Inf"),
]


@pytest.mark.parametrize(("name", "value", "words"), DAMAGE, ids=[f"{name}-{value}" for name, value, _ in DAMAGE])
def test_trap_10_a_damaged_tensor_is_refused_by_name(name: str, value: float, words: str) -> None:
    model = small()
    with torch.no_grad():
        model.state_dict()[name][1] = value
    with pytest.raises(ReparamError) as refused:
        reparameterize(model)
    assert str(refused.value).startswith(f"{name}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"), [("layer1.0.bn1.running_var", -1e-9), ("layer1.0.bn1.running_mean", math.nan), ("conv1.weight", math.inf)]
)
def test_trap_10_in_a_stranger_s_network(name: str, value: float) -> None:
    model = pytest.importorskip("torchvision").models.resnet18().eval()
    with torch.no_grad():
        model.state_dict()[name][1] = value
    with pytest.raises(ReparamError, match=rf"^{name}: "):
        reparameterize(model)


def test_a_variance_of_zero_folds_exactly() -> None:
    """A channel that never varied in training; eps makes it well defined."""
    model = small()
    with torch.no_grad():
        for name in ("stages.1.0.block.conv_kxk.bn", "stages.2.1.block.identity"):
            model.get_submodule(name).running_var[1] = 0  # type: ignore[index, operator]
    assert verify(model.double(), reparameterize(model.double()), (3, 64, 64)).ok


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_trap_15_hooks(register: str) -> None:
    """Left beside a batch norm, refused in a block; hooks around both stay."""
    for name in ("conv", "bn"):
        model = randomize(Siblings(), SMALL)
        getattr(model.get_submodule(name), register)(lambda *_: None)
        report = assert_folds_exactly(model, SMALL)
        assert "carries forward hooks" in report.left["bn"]
    block = repvgg(4, 4).eval()
    getattr(block.get_submodule("conv_1x1.bn"), register)(lambda *_: None)
    with pytest.raises(ReparamError, match=r"^0\.conv_1x1\.bn: carries forward hooks.*remove them first"):
        reparameterize(nn.Sequential(block).eval())
    seen: list[int] = []
    outside = randomize(Siblings(), SMALL)
    getattr(outside, register)(lambda *_: seen.append(1))
    folded = reparameterize(outside)
    folded(torch.randn(SMALL))
    assert report_of(folded).pairs == [("conv", "bn")]
    assert seen == [1]


@pytest.mark.parametrize("nothing", [nn.Identity, nn.Dropout])
def test_trap_15_a_hook_on_what_does_nothing_does_something(nothing: type[nn.Module]) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nothing(), nn.BatchNorm2d(4)), SMALL)
    model[1].register_forward_hook(lambda module, args, out: out.relu())
    report = assert_folds_exactly(model, SMALL)
    assert report.left["2"].startswith(f"its {nothing.__name__} carries forward hooks")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_trap_15_old_weight_norm_is_refused_and_old_spectral_norm_left() -> None:
    weight_normed = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ReparamError, match=r"^0: `weight` is the result of a computation.*remove old-style weight_norm"):
        reparameterize(weight_normed)
    nn.utils.remove_weight_norm(weight_normed[0])
    assert assert_folds_exactly(randomize(weight_normed, SMALL), SMALL).pairs == [("0", "1")]
    spectral = randomize(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), SMALL)
    with torch.no_grad():
        report = assert_folds_exactly(spectral, SMALL)
    assert report.left["1"].startswith("its Conv2d carries forward hooks (old-style spectral_norm is one)")


class Holds(Siblings):
    """Holds something besides."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: nn.Sequential(Holds(threading.Lock())), r"0: `thing`, a lock, cannot be copied \(.*\): take it out"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), r"0\.weight: is not initialised yet: call the model with an input first"),
        (lambda: Siblings().to("meta"), r"conv\.weight: is on the meta device, .*: load the weights first"),
        (lambda: small().to("meta"), r"stem\.block.*: is on the meta device"),
        (pruned, r"0: `weight` is the result of a computation.*prune\.remove"),
    ],
    ids=["lock", "lazy", "meta", "meta block", "pruned"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_folded_or_copied_is_refused_by_name(make: Callable[[], nn.Module], line: str) -> None:
    with pytest.raises(ReparamError, match=f"^{line}"):
        reparameterize(make().eval())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_convolution_without_channels_is_left_and_a_batch_norm_refused() -> None:
    report = report_of(reparameterize(nn.Sequential(nn.Conv2d(0, 4, 3), nn.BatchNorm2d(4)).eval()))
    assert report.left.keys() == {"1"}
    with pytest.raises(ReparamError, match=r"^1\.weight: has no channels: take the module out"):
        reparameterize(nn.Sequential(nn.Conv2d(3, 0, 3), nn.BatchNorm2d(0)).eval())


def test_parameters_of_any_dtype_are_looked_at() -> None:
    numbers = torch.ones(3, dtype=torch.complex64)
    for dtype in (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.bool):
        assert is_finite(numbers.real.to(dtype) if dtype != torch.complex64 else numbers)
    assert not is_finite(numbers * complex(1, math.nan))
    assert not is_finite(torch.tensor([1, math.inf]).to(torch.float8_e5m2))
    assert report_of(reparameterize(Holds(nn.Parameter(numbers)).eval())).pairs == [("conv", "bn")]


def test_trap_15_a_forward_of_its_own_is_refused() -> None:
    """A deep copy's `forward` would still be the original's: what torch.compile returns, and what some packages patch in."""
    patched = nn.Sequential(nn.ReLU(), Siblings())
    patched[1].forward = lambda x: x
    compiled: Any = torch.compile(Siblings())
    model: Any
    for model, name in ((patched, "1"), (compiled, "OptimizedModule")):
        model.eval()
        with pytest.raises(ReparamError, match=rf"^{name}: has a forward of its own.*fold the plain module"):
            reparameterize(model)
        with pytest.raises(ReparamError, match=rf"^{name}: has a forward of its own"):
            verify(model, model, (3, 8, 8))
    patched_conv = conv().eval()
    vars(patched_conv)["forward"] = lambda x: x
    with pytest.raises(ReparamError, match=r"^a: has a forward of its own"):
        as_linear(Branches(a=patched_conv).eval())


class Doubles(nn.Conv2d):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = 2 * super().__call__(x)
        return found


def test_a_call_of_its_own_is_kept() -> None:
    """Of the network itself it may only say a type; of a part it may do something."""

    class Typed(nn.Sequential):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().__call__(x)
            return found

    assert_folds_exactly(Typed(Doubles(3, 4, 1), nn.BatchNorm2d(4)), SMALL)
    assert report_of(reparameterize(Typed(Doubles(3, 4, 1), nn.BatchNorm2d(4)).eval())).left.keys() == {"1"}


@pytest.mark.parametrize(
    ("wrapped", "line"),
    [
        (lambda net: nn.DataParallel(net), r"is a wrapper: pass its network, as in reparameterize\(x\.module\.eval\(\)\)"),
        (lambda net: torch.jit.trace(net, torch.zeros(1, 3, 8, 8)), "is TorchScript, which cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrappers_say_what_to_pass(wrapped: Callable[[nn.Module], nn.Module], line: str) -> None:
    with pytest.raises(ReparamError, match=line):
        reparameterize(wrapped(nn.Conv2d(3, 4, 3).eval()))
