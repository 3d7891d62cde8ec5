"""Fold networks of other people's, on random batch-norm statistics, and compare the whole in float64 (slow)."""

import pytest
import torch
from folding import report_of
from torch import nn

from repvgg.fold.proof import compare
from repvgg.fold.reparameterize import reparameterize

pytestmark = pytest.mark.slow

TIMM = """
    repvgg_a0 mobileone_s0 fastvit_t8 repvit_m0_9 ghostnetv3_050 repghostnet_050 mixnet_s inception_next_atto visformer_tiny
    nextvit_small efficientformerv2_s0 starnet_s1 resnet50 resnext50_32x4d seresnet50 resnet26d wide_resnet50_2 regnetx_002
    regnety_002
    densenet121 dla34 vgg11_bn efficientnet_b0 efficientnetv2_rw_t mobilenetv2_050 mobilenetv3_small_100 mnasnet_small hardcorenas_a
    lcnet_050 tinynet_e fbnetc_100 ghostnet_050 selecsls42 inception_v3 xception41 cspresnet50 darknet53 hrnet_w18_small
    legacy_seresnet18 gernet_s
""".split()  # noqa: SIM905
TORCHVISION = """
    resnet18 googlenet inception_v3 densenet121 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0
    regnet_y_400mf
""".split()  # noqa: SIM905


def on_random_statistics(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with random statistics and affine parts near those of a trained network."""
    random = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(getattr(m, "running_mean", None), torch.Tensor)):
        norm.running_mean.normal_(0, 0.2, generator=random)  # type: ignore[operator, union-attr]
        norm.running_var.uniform_(0.5, 2, generator=random)  # type: ignore[operator, union-attr]
        for tensor in norm.parameters():
            tensor.data.uniform_(0.5, 1.5, generator=random)
    return model.double().eval()


def check(model: nn.Module, size: tuple[int, int, int]) -> None:
    images = torch.randn(2, *size, dtype=torch.float64)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    folded = reparameterize(model)
    found = compare(model, folded, (images,))
    report = report_of(folded)
    print(f"{norms} batch norms, {len(report.pairs)} pairs folded, {len(report.left)} left: {found}")
    assert found.ok, found
    assert len(set(report.left.values())) <= norms


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name: str) -> None:
    model = pytest.importorskip("timm").create_model(name)
    channels, *sides = model.default_cfg["input_size"]
    fixed = model.default_cfg.get("fixed_input_size", False)
    height, width = sides if fixed else (min(side, 128) for side in sides)
    check(on_random_statistics(model), (channels, height, width))


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    size = 299 if name == "inception_v3" else 128
    model = models.get_model(name, weights=None, **({"init_weights": False} if name in ("googlenet", "inception_v3") else {}))
    check(on_random_statistics(model), (3, size, size))
