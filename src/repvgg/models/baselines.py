"""The paper's comparators (Tables 4 and 5), from timm.

    model = create_baseline("resnet50")
    deploy = repvgg.reparameterize(model.eval())     # folds every conv+BN, as the paper does before it times them

Each goes by its timm name and is timm's network, but for ResNet-50, 101 and 152. The paper measures the original ones (He et
al. 2016, "v1"), whose downsampling bottlenecks have their stride on the first 1x1 convolution; timm's have it on the 3x3.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Baseline:
    """timm's name, the side of its square input in the paper, and whether its bottlenecks are those of v1."""

    timm_name: str
    input_size: int = 224
    v1: bool = False


BASELINES: dict[str, Baseline] = {
    "resnet18": Baseline("resnet18"),
    "resnet34": Baseline("resnet34"),
    "resnet50": Baseline("resnet50", v1=True),
    "resnet101": Baseline("resnet101", v1=True),
    "resnet152": Baseline("resnet152", v1=True),
    "vgg16": Baseline("vgg16"),
    "resnext50_32x4d": Baseline("resnext50_32x4d"),
    "resnext101_32x4d": Baseline("resnext101_32x4d"),
    "efficientnet_b0": Baseline("efficientnet_b0"),
    "efficientnet_b3": Baseline("efficientnet_b3", input_size=300),
    "regnetx_032": Baseline("regnetx_032"),
    "regnetx_120": Baseline("regnetx_120"),
}


def list_baselines() -> list[str]:
    """Names that `create_baseline` knows."""
    return list(BASELINES)


def input_size(name: str) -> int:
    """Height and width of the images this baseline is measured with."""
    return _baseline(name).input_size


def create_baseline(name: str, num_classes: int = 1000, in_chans: int = 3, pretrained: bool = False) -> nn.Module:
    """A comparator in train mode, batch norms unfolded: images [N, in_chans, H, W] -> logits [N, num_classes].

    pretrained: timm's default weights, fetched from the hub. Raises ValueError for an unknown name, where timm is missing, where
    the weights cannot be fetched, and for pretrained weights of a v1 network, of which timm has none.
    """
    baseline = _baseline(name)
    if pretrained and baseline.v1:
        raise ValueError(
            f"there are no pretrained weights for {name}: it is the paper's v1, with the stride on the 1x1 convolution, and timm's "
            "were trained with the stride on the 3x3; "
            f"timm.create_model({baseline.timm_name!r}, pretrained=True) is that other network"
        )
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} comes from timm: pip install 'repvgg[bench]'") from None
    try:
        model: nn.Module = timm.create_model(baseline.timm_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"timm cannot make {name}: {(str(error).splitlines() or [''])[0]}") from error
    if baseline.v1:
        _move_strides_to_1x1(model)
    return model


def _baseline(name: str) -> Baseline:
    if name not in BASELINES:
        raise ValueError(f"no baseline {name!r}: there are {', '.join(BASELINES)}")
    return BASELINES[name]


def _move_strides_to_1x1(model: nn.Module) -> None:
    """Exchange the strides of conv1 (1x1) and conv2 (3x3) in every bottleneck: 1 and 2 where it downsamples, else both 1."""
    from timm.models.resnet import Bottleneck

    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
