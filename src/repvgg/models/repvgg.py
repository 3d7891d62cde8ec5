"""The network.

    stem, then four stages of 3x3 layers, the first of each with stride 2; global average pooling; a linear classifier.

`create_model` of zoo.py builds the members of names.py. Source: RepVGG (CVPR 2021), Tables 2 and 3.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import UNFOLDABLE, Conv1x1, SqueezeExcite, deploy_conv, find_block, with_bn
from repvgg.models.names import Member


@dataclass(frozen=True)
class LayerSpec:
    """One 3x3 layer as numbers. stage: 0 for the stem, then 1 to 4."""

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    dilation: int
    groups: int


def layer_plan(
    member: Member,
    in_chans: int = 3,
    output_stride: int = 32,
    width: float = 1.0,
    small_input: bool = False,
    dilated_layers: int | None = None,
    widths: Sequence[int] | None = None,
) -> list[LayerSpec]:
    """Return every 3x3 layer of a network in order, the stem first; arguments as `RepVGG` takes them."""
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}: choose 8, 16 or 32")
    if in_chans < 1 or not 0 < width <= 16:
        raise ValueError("in_chans is at least 1, width is above 0 and at most 16")
    count = 1 + sum(member.depths)
    channels = [in_chans, *(widths or member.layer_widths(width))]
    if len(channels) != 1 + count or min(channels) < 1:
        raise ValueError(f"widths are the channels of {count} layers, at least 1 each")
    strides, dilations = _strides_and_dilations(output_stride, small_input)
    undilated = 0 if dilated_layers is None else count - dilated_layers  # so many layers at the start
    plan: list[LayerSpec] = []
    for stage, depth in enumerate((1, *member.depths)):
        for first in (True, *(False,) * (depth - 1)):
            number = len(plan) + 1  # the stem is the 1st; the 3rd, 5th, ... layers are the grouped ones
            plan.append(
                LayerSpec(
                    stage,
                    in_channels=channels[number - 1],
                    out_channels=channels[number],
                    stride=strides[stage] if first else 1,
                    dilation=dilations[stage] if number > undilated else 1,
                    groups=member.groups if number % 2 and number > 1 else 1,
                )
            )
    return plan


def _strides_and_dilations(output_stride: int, small_input: bool) -> tuple[list[int], list[int]]:
    """Return both for the five stages. A stage that loses its stride doubles the dilation of every 3x3 from its first layer on."""
    strides = [1, 1, 2, 2, 2] if small_input else [2, 2, 2, 2, 2]
    dilations = [1, 1, 1, 1, 1]
    for stage in range(5)[{32: 5, 16: 4, 8: 3}[output_stride] :]:
        strides[stage] = 1
        dilations[stage] = dilations[stage - 1] * 2
    return strides, dilations


class Layer(nn.Module):
    """`act(se(block(x)))`; the block is one 3x3 convolution in deploy form."""

    def __init__(self, block: nn.Module, se: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.se = se
        self.act = nn.ReLU(inplace=True)  # nothing else reads what the block returns

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.block(x)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two layers with a shortcut around them, as in ResNet-18: `act(block(layer(x)) + shortcut(x))`."""

    def __init__(self, layer: Layer, block: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.block = block
        self.shortcut = shortcut
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.block(self.layer(x)) + self.shortcut(x))  # type: ignore[no-any-return]


class _Mean(nn.Module):
    """Take the mean over all places, as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class RepVGG(nn.Module):
    """A RepVGG classifier: images [N, in_chans, H, W] -> logits [N, num_classes], any H and W.

    num_classes 0 makes a backbone, which returns its last feature map.

    output_stride: 32, or 16 or 8, where the last one or two stages keep their resolution and dilate every 3x3 instead; of all the
    network's layers only the last `dilated_layers`, if given.
    small_input: stem and first stage at stride 1, for images of some 32 pixels. block: a name in `BLOCKS`; None for the member's.
    widths: channels of each layer, the stem's first, where a network was pruned; None for the member's.
    """

    def __init__(
        self,
        member: Member,
        num_classes: int = 1000,
        in_chans: int = 3,
        deploy: bool = False,
        output_stride: int = 32,
        width: float = 1.0,
        small_input: bool = False,
        block: str | None = None,
        dilated_layers: int | None = None,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        block = block or member.block
        make = find_block(block)
        if deploy and block in UNFOLDABLE:
            raise ValueError(f"the block {block} has no deploy form: it cannot be folded")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}: at least 1, or 0 for a backbone")
        plan = layer_plan(member, in_chans, output_stride, width, small_input, dilated_layers, widths)
        make = deploy_conv if deploy else make

        def layer(spec: LayerSpec) -> Layer:
            block = make(spec.in_channels, spec.out_channels, spec.stride, spec.dilation, spec.groups)
            return Layer(block, SqueezeExcite(spec.out_channels) if member.squeeze_excite else nn.Identity())

        def stage(specs: list[LayerSpec]) -> nn.Sequential:
            layers = [layer(spec) for spec in specs]
            return nn.Sequential(*(_in_pairs(layers, specs, deploy) if member.residual and len(layers) > 1 else layers))

        stem, *stages = ([spec for spec in plan if spec.stage == number] for number in range(5))
        self.stem = layer(stem[0])
        self.stages = nn.Sequential(*(stage(specs) for specs in stages))
        self.num_features = plan[-1].out_channels
        self.head: Any = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.checkpointing = False

    @property
    def num_classes(self) -> int:
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, [N, num_features, H / output_stride, W / output_stride] (rounded up)."""
        return self.forward_intermediates(x)[-1]

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """Return the feature maps of the five stages of Table 2 (the stem's first); or of `indices` alone, or of the last n."""
        x = self._run(self.stem, x)
        features = [x]
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = self._run(layer, x)
            features.append(x)
        if indices is None:
            return features
        return features[len(features) - indices :] if isinstance(indices, int) else [features[i] for i in indices]

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3))) if self.num_classes else features  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles in place of a deploy form: the same modules in a row, by the same names."""
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=self.stem, stages=self.stages)
        if self.num_classes:
            parts |= OrderedDict(pool=_Mean(), head=self.head)
        return nn.Sequential(parts).train(self.training)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, untrained classifier of `num_classes` outputs in place of the old one; 0 leaves a backbone."""
        like, size = next(self.parameters()), (self.num_features, num_classes)
        self.head = nn.Linear(*size, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input in training and compute the rest again in the backward pass."""
        self.checkpointing = enable

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            out: Tensor = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _restored_buffers(layer)))
            return out
        return layer(x)  # type: ignore[no-any-return]


def _in_pairs(layers: list[Layer], specs: list[LayerSpec], deploy: bool) -> list[Residual]:
    """Join each two layers to a residual block; where the first changes the shape, a 1x1 with batch norm is the shortcut."""
    into, out, stride = specs[0].in_channels, specs[1].out_channels, specs[0].stride
    joined: list[Residual] = []
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        shortcut: nn.Module = nn.Identity()
        if not joined and (into != out or stride != 1):
            shortcut = nn.Conv2d(into, out, 1, stride) if deploy else Branches(conv=with_bn(Conv1x1(into, out, stride)))
        joined.append(Residual(first, second.block, shortcut))
    return joined


@contextmanager
def _restored_buffers(layer: nn.Module) -> Iterator[None]:
    """Put running statistics back, so that batch norms count a batch once though checkpointing computes it twice."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def is_deploy_form(model: nn.Module) -> bool:
    """Say whether every layer's block is one plain convolution."""
    return all(type(m.block) is nn.Conv2d for m in model.modules() if isinstance(m, (Layer, Residual)))
