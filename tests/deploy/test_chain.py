"""Networks that are one chain, as layers of the native engine."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from rounding import ENGINES, rounding
from torch import Tensor, nn

import repvgg

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from repvgg_engine.layers import Conv, MaxPool, Pool

from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.engines.chain import chain
from repvgg.deploy.engines.native import NativeModule


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path))


class Flattened(nn.Module):
    """torchvision's kind of VGG: max-pools, an adaptive pool that does nothing, linear layers on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        convs = [nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        convs += [nn.Conv2d(20, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        self.features = nn.Sequential(*convs)
        self.pool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(nn.Linear(24 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits


def timms() -> nn.Module:
    """timm's VGG with batch norm, of few layers."""
    from timm.models.vgg import VGG

    net: nn.Module = VGG((8, "M", 16, 16, "M"), num_classes=5, norm_layer=nn.BatchNorm2d)
    net.pre_logits.fc1 = nn.Conv2d(16, 40, 7)  # type: ignore[union-attr]
    net.pre_logits.fc2 = nn.Conv2d(40, 24, 1)  # type: ignore[union-attr]
    net.head.fc = nn.Linear(24, 5)  # type: ignore[union-attr]
    return net


@pytest.mark.parametrize("network", [Flattened, timms])
@torch.no_grad()
def test_vggs(network: type[nn.Module]) -> None:
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    folded = repvgg.reparameterize(randomize(network(), tuple(images.shape)))
    engine = engines.build("native", folded, Options((3, 28, 28), 3, threads=1))
    wanted = copy.deepcopy(folded).double()(images.double())
    assert relative_error(engine(images), wanted) <= rounding(folded, images, times=ENGINES)


class Filtered(nn.Module):
    """A first kernel that is no parameter: a buffer that is not saved, or a plain tensor. Then a reshape asks for the batch."""

    def __init__(self, saved: bool) -> None:
        super().__init__()
        kernel = torch.randn(3, 3, 3, 3)
        if saved:
            self.register_buffer("kernel", kernel, persistent=False)
        else:
            self.kernel = kernel
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4 * 5 * 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.conv2d(x, self.kernel, padding=1)).relu()
        out: Tensor = self.fc(x.view(x.size(0), -1))
        return out


@pytest.mark.parametrize("saved", [True, False])
def test_kernels_that_are_no_parameters(saved: bool) -> None:
    model, images = Filtered(saved).eval(), torch.randn(3, 3, 12, 12)
    engine = engines.build("native", model, Options((3, 12, 12), 3, threads=1))
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()
        wanted.kernel = model.kernel.double()
        assert relative_error(engine(images), wanted(images.double())) <= 1e-5


def test_what_a_chain_becomes() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    found = chain(net.eval(), (3, 17, 17))
    assert found
    assert [type(layer) for layer in found.layers] == [Conv, MaxPool, Conv, Pool]


def averaged(size: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(size), nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("network", "fixed"),
    [
        (averaged(1, nn.Linear(8, 5)), False),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), False),
        (averaged(8, nn.Linear(8 * 64, 5)), True),  # a pool that does nothing, and a convolution of the map's size
        (nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 64, 5)), True),
        (nn.Sequential(nn.Conv2d(3, 8, 17), nn.AdaptiveAvgPool2d(1)), True),
        (nn.Sequential(nn.Conv2d(3, 8, 17), nn.Flatten(), nn.Linear(8, 5)), True),
        (nn.Sequential(nn.Conv2d(3, 8, 17), nn.Flatten()), True),
    ],
)
@torch.no_grad()
def test_images_of_another_size(network: nn.Module, fixed: bool) -> None:
    """They give what PyTorch gives, or are refused: a chain that was traced at one size may be another network at others."""
    found = chain(network.eval(), (3, 17, 17))
    assert found
    assert found.fixed == fixed
    options = Options((3, 17, 17), threads=1)
    module, engine = NativeModule(network, options, accuracy="exact"), engines.build("native", network, options)
    images = torch.randn(2, 3, 17, 17)
    assert torch.allclose(module(images), network(images), atol=1e-4)
    larger = torch.randn(2, 3, 23, 19)
    if fixed:
        for run in (module, engine):
            with pytest.raises(ValueError, match="built for images of 3 x 17 x 17, not 3 x 23 x 19"):
                run(larger)
    else:
        assert torch.allclose(module(larger), network(larger), atol=1e-4)


class MeanOfChannels(nn.Module):
    """Its result has the shape that a global pool's has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2))


class AlwaysDrops(nn.Module):
    """As F.dropout does by default, whatever `eval` says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), AlwaysDrops()),
        nn.Sequential(nn.Conv2d(3, 14, 3), MeanOfChannels()),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.GELU()),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2, ceil_mode=True)),
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(2)),
    ],
)
def test_what_is_none(network: nn.Module) -> None:
    assert chain(network.eval(), (3, 16, 16)) is None


def test_branches_are_none() -> None:
    assert chain(repvgg.create_model("resnet18").eval(), (3, 64, 64)) is None
