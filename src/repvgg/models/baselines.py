"""The paper's comparators (Tables 4 and 5), from timm.

    model = create_baseline("resnet50")
    deploy = repvgg.reparameterize(model.eval())     # folds every conv+BN, as the paper does before it times them

Each goes by its timm name and is timm's network, but for ResNet-50, 101 and 152. The paper measures the original ones (He et
al. 2016, "v1"), whose downsampling bottlenecks have their stride on the first 1x1 convolution; timm's have it on the 3x3.
"""

from torch import nn

from repvgg.disk import in_a_line
from repvgg.models.manifest import Preprocessing
from repvgg.models.names import BASELINES


def create_baseline(name: str, num_classes: int = 1000, in_chans: int = 3, pretrained: bool = False) -> nn.Module:
    """Return a comparator in train mode, batch norms unfolded: images [N, in_chans, H, W] -> logits [N, num_classes].

    pretrained: timm's default weights, fetched from the hub. Raises ValueError for an unknown name, where timm is missing, where
    the weights cannot be fetched, and for pretrained weights of a v1 network, of which timm has none.
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline {name!r}: there are {', '.join(BASELINES)}")
    baseline = BASELINES[name]
    if pretrained and baseline.v1:
        raise ValueError(
            f"there are no pretrained weights for {name}: it is the paper's v1, with the stride on the 1x1 convolution, and timm's "
            "were trained with the stride on the 3x3; "
            f"timm.create_model({baseline.timm_name!r}, pretrained=True) is that other network"
        )
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} comes from timm: pip install timm") from None
    try:
        model: nn.Module = timm.create_model(baseline.timm_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"timm cannot make {name}: {in_a_line(error)}") from error
    if baseline.v1:
        _move_strides_to_1x1(model)
    return model


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """Return what timm evaluates its weights of this model with."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    size = config["input_size"]
    return Preprocessing(size, int(size[-1] / config["crop_pct"]), config["interpolation"], config["mean"], config["std"])


def _move_strides_to_1x1(model: nn.Module) -> None:
    """Exchange the strides of conv1 (1x1) and conv2 (3x3) in every bottleneck: 1 and 2 where it downsamples, else both 1."""
    from timm.models.resnet import Bottleneck

    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
