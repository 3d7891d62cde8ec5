"""PSPNet (Zhao et al., CVPR 2017) on a dilated RepVGG, as in Table 8 of the RepVGG paper, or on a dilated ResNet.

    backbone at stride 8  ->  means over 1, 2 x 2, 3 x 3, 6 x 6 bins, beside the map itself  ->  3x3  ->  classes, upsampled

    model = create_model("pspnet_repvgg_a0_fast", num_classes=19)
    model.eval()(images)        # logits [N, 19, H, W]; in train mode a pair, with those of the auxiliary head

In the full plan every 3x3 of the backbone's last two stages dilates, in the *fast* one only its last five layers.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repvgg.disk import in_a_line
from repvgg.models.names import FAMILY, PSPNETS
from repvgg.models.repvgg import RepVGG, checkpoint_contexts

BINS = (1, 2, 3, 6)
STRIDE = 8
FAST = 5  # layers: the last four of stage 4 and the only one of stage 5
DROPOUT = 0.1
HEAD, AUXILIARY = 512, 256  # channels


def create_pspnet(
    name: str,
    num_classes: int,
    in_chans: int = 3,
    deploy: bool = False,
    *,
    pretrained: bool = False,
    width: float = 1.0,
    block: str = "repvgg",
) -> "PSPNet":
    """Return a PSPNet by its name, in train mode. width: times the channels of backbone and heads. pretrained: a ResNet of width 1
    starts from timm's default weights.

    deploy: in deploy form, on a RepVGG; on a ResNet that form comes of folding. Raises ValueError where timm is missing, its
    weights cannot be fetched, or they do not fit the width.
    """
    plan = PSPNETS[name]
    if plan.backbone in FAMILY:
        member = FAMILY[plan.backbone]
        layers = FAST if plan.fast else None
        backbone: nn.Module = RepVGG(member, 0, in_chans, deploy, STRIDE, width, block=block, dilated_layers=layers, global_pool="")
        _, _, _, middle, last = member.widths(width)
    else:
        backbone, (middle, last) = _resnet(plan.backbone, in_chans, pretrained, width)
    return PSPNet(backbone, middle, last, num_classes, deploy, width)


class PSPNet(nn.Module):
    """Images [N, in_chans, H, W] -> logits [N, num_classes, H, W], any H and W.

    In train mode a pair: these, and those of an auxiliary head on the last stage but one, which the deploy form does not have.
    The head has 512 channels and the auxiliary one 256, whatever the backbone, as in the original's code (times `width`); a level
    of the pyramid has a quarter of the channels of the map that it reads.
    """

    training_only = ("auxiliary",)

    def __init__(
        self, backbone: nn.Module, middle: int, last: int, num_classes: int, deploy: bool = False, width: float = 1.0
    ) -> None:
        """Build the heads on a backbone. middle, last: channels of the backbone's last two stages; width: scales the heads."""
        super().__init__()
        level, head, auxiliary = max(1, last // len(BINS)), max(1, round(HEAD * width)), max(1, round(AUXILIARY * width))
        self.backbone = backbone
        self.pyramid = Pyramid(last, level, deploy)
        self.head = _head(last + len(BINS) * level, head, num_classes, deploy)
        self.auxiliary = None if deploy else _head(middle, auxiliary, num_classes)

    @property
    def num_classes(self) -> int:
        classifier = self.head.get_submodule("classifier")
        assert isinstance(classifier, nn.Conv2d)
        return classifier.out_channels

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = x.shape[-2:]
        # With 8 n + 1 pixels a side, map and image have their corners in common; what is added on the right and below is cut off.
        x = F.pad(x, (0, -(width - 1) % STRIDE, 0, -(height - 1) % STRIDE))
        middle, last = self._features(x)
        logits = _upsampled(self.head(self.pyramid(last)), x)[..., :height, :width]
        if self.training and self.auxiliary is not None:
            return logits, _upsampled(self.auxiliary(middle), x)[..., :height, :width]
        return logits

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError("torch.jit.script cannot compile a PSPNet: repvgg export --to pt2 keeps it as a program")

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the last two stages."""
        if isinstance(self.backbone, RepVGG):
            return self.backbone.forward_intermediates(x, 2, intermediates_only=True)  # type: ignore[no-any-return]
        return self.backbone(x)  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int) -> None:
        """Put new, untrained last layers of `num_classes` outputs in place of the old ones."""
        for head in (self.head, self.auxiliary):
            if head is not None:
                old: Any = head.get_submodule("classifier")
                new = nn.Conv2d(old.in_channels, num_classes, 1, device=old.weight.device, dtype=old.weight.dtype)
                head.set_submodule("classifier", new.train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the backbone's layers in training and compute the rest again in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def load_backbone(self, tensors: Mapping[str, Tensor]) -> str:
        """Load the weights of a RepVGG classifier, strictly but for its head, into the backbone; return a line that says so.

        Raises ValueError for weights of another network or form.
        """
        own = self.backbone.state_dict()
        given = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        unlike = own.keys() ^ given.keys() or {name for name in own if own[name].shape != given[name].shape}
        if unlike:
            raise ValueError(f"these weights are not of this backbone, in its form: they differ in {_some(unlike)}")
        self.backbone.load_state_dict(given)
        left = sorted(tensors.keys() - given.keys())
        return f"{len(given)} tensors in the backbone; left out: {', '.join(left) or 'none'}; new: pyramid, head, auxiliary head"


class Pyramid(nn.Module):
    """The map and, beside it, its means over 1, 2 x 2, 3 x 3 and 6 x 6 bins, each through a 1x1 convolution and upsampled."""

    def __init__(self, channels: int, width: int, deploy: bool = False) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(_conv_bn_relu(channels, width, 1, deploy)) for _ in BINS)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for bins, level in zip(BINS, self.levels, strict=True):
            means = F.adaptive_avg_pool2d(x, bins)
            alone = self.training and bins == 1 and x.shape[0] == 1 and not _synchronised(level)
            means = _by_running_statistics(level, means) if alone else level(means)
            maps.append(F.interpolate(means, x.shape[-2:], mode="bilinear", align_corners=True))
        return torch.cat(maps, 1)


def _synchronised(level: Any) -> bool:
    """Say whether the batch norm sees other processes' images too, who wait for this one's."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return together and isinstance(level.bn, nn.SyncBatchNorm)


def _by_running_statistics(level: Any, x: Tensor) -> Tensor:
    """Run a level in train mode on one value a channel, which has no variance to normalise by."""
    bn = level.bn
    return F.relu(F.batch_norm(level.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))


def _head(channels: int, width: int, num_classes: int, deploy: bool = False) -> nn.Sequential:
    layers = _conv_bn_relu(channels, width, 3, deploy)
    return nn.Sequential(OrderedDict(**layers, dropout=nn.Dropout2d(DROPOUT), classifier=nn.Conv2d(width, num_classes, 1)))


def _conv_bn_relu(channels: int, width: int, kernel_size: int, deploy: bool) -> "OrderedDict[str, nn.Module]":
    """Return the three layers; in deploy form as `reparameterize` leaves them."""
    return OrderedDict(
        conv=nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=deploy),
        bn=nn.Identity() if deploy else nn.BatchNorm2d(width),
        act=nn.ReLU(inplace=True),
    )


def _upsampled(logits: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(logits, like.shape[-2:], mode="bilinear", align_corners=True)


class _Stages(nn.ModuleDict):
    """A ResNet of timm's by stages, under its names; timm's forward asks what types values have, and no fold can see into it."""

    checkpointing = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the last two stages."""
        maps = []
        for name, stage in self.items():
            again = self.checkpointing and self.training and name.startswith("layer")
            contexts = partial(checkpoint_contexts, stage)
            x = checkpoint(stage, x, use_reentrant=False, context_fn=contexts) if again else stage(x)
            maps.append(x)
        return maps[-2:]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable


def _resnet(name: str, in_chans: int, pretrained: bool, width: float) -> tuple[nn.Module, list[int]]:
    """Return timm's backbone, with the feature maps of its last two stages at stride 8, and their channels."""
    if not 0 < width <= 16:
        raise ValueError("width is above 0 and at most 16")
    if pretrained and width != 1:
        raise ValueError(f"pspnet_{name}: pretrained weights fit width=1 only")
    try:
        import timm
    except ImportError:
        raise ValueError(f"pspnet_{name} has its backbone from timm: pip install timm") from None
    options = {"features_only": True, "output_stride": STRIDE, "out_indices": (3, 4)}
    try:
        backbone: Any = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"timm cannot make {name}: {in_a_line(error)}") from error
    if width != 1:
        _narrow(backbone, width, in_chans)
    return _Stages(dict(backbone.items())), [_times(width, channels) for channels in backbone.feature_info.channels()]


def _narrow(backbone: nn.Module, width: float, in_chans: int) -> None:
    """Give every map but the image `width` times its channels: maps that are added stay alike. The convolutions start anew."""
    for path, module in list(backbone.named_modules()):
        if isinstance(module, nn.Conv2d):
            into = in_chans if path == "conv1" else _times(width, module.in_channels)
            module.in_channels, module.out_channels = into, _times(width, module.out_channels)
            shape = module.out_channels, into, *module.kernel_size
            module.weight = nn.Parameter(module.weight.new_empty(shape))
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as timm does
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = _times(width, module.num_features)
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.dim():  # not the count of batches; a new one's are all alike
                    tensor.data = tensor.data[:1].expand(module.num_features).clone()


def _times(width: float, channels: int) -> int:
    return max(1, round(width * channels))


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
