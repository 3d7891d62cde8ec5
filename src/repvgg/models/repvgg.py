"""The network and the family.

    stem, then four stages of 3x3 layers, the first of each with stride 2; global average pooling; a linear classifier.

`create_model` of zoo.py builds the members by name. Sources: RepVGG (CVPR 2021), Tables 2 and 3; D2se from the official code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import UNFOLDABLE, Conv1x1, SqueezeExcite, deploy_conv, find_block, with_bn


@dataclass(frozen=True)
class Member:
    """Depths of stages 2 to 5 (stage 1 is the stem), the width multipliers a and b, groups of every other layer, structure."""

    depths: tuple[int, int, int, int]
    a: float
    b: float
    groups: int = 1
    squeeze_excite: bool = False
    residual: bool = False  # two layers and a shortcut at a time, as in ResNet-18
    block: str = "repvgg"  # unless another is asked for

    def widths(self, width: float = 1.0) -> tuple[int, ...]:
        """Channels of the five stages: min(64, 64a), 64a, 128a, 256a, 512b (Table 2), each a multiple of `groups`."""
        a, b = self.a * width, self.b * width
        exact = (min(64, 64 * a), 64 * a, 128 * a, 256 * a, 512 * b)
        return tuple(max(1, round(channels / self.groups)) * self.groups for channels in exact)

    def layer_widths(self, width: float = 1.0) -> list[int]:
        """Channels of every layer, the stem first."""
        return [channels for depth, channels in zip((1, *self.depths), self.widths(width), strict=True) for _ in range(depth)]


A, B = (2, 4, 14, 1), (4, 6, 16, 1)
FAMILY: dict[str, Member] = {
    "repvgg_a0": Member(A, 0.75, 2.5),
    "repvgg_a1": Member(A, 1, 2.5),
    "repvgg_a2": Member(A, 1.5, 2.75),
    "repvgg_b0": Member(B, 1, 2.5),
    "repvgg_b1": Member(B, 2, 4),
    "repvgg_b1g2": Member(B, 2, 4, groups=2),
    "repvgg_b1g4": Member(B, 2, 4, groups=4),
    "repvgg_b2": Member(B, 2.5, 5),
    "repvgg_b2g2": Member(B, 2.5, 5, groups=2),
    "repvgg_b2g4": Member(B, 2.5, 5, groups=4),
    "repvgg_b3": Member(B, 3, 5),
    "repvgg_b3g2": Member(B, 3, 5, groups=2),
    "repvgg_b3g4": Member(B, 3, 5, groups=4),
    "repvgg_d2se": Member((8, 14, 24, 1), 2.5, 5, squeeze_excite=True),
    # Beyond the paper: small enough to train on a CPU in minutes.
    "repvgg_micro": Member((2, 2, 4, 1), 0.5, 0.5),
}
# What is built from a member's numbers: the family; and Table 7's "residual reorganisation", which is no RepVGG.
NETWORKS: dict[str, Member] = {
    **FAMILY,
    "repvgg_b0_residual": replace(FAMILY["repvgg_b0"], residual=True, block="plain"),
}


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


class RepVGG(nn.Module):
    """A RepVGG classifier: images [N, in_chans, H, W] -> logits [N, num_classes], any H and W.

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
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}: choose 8, 16 or 32")
        make = find_block(block)
        if deploy and block in UNFOLDABLE:
            raise ValueError(f"the block {block} has no deploy form: it cannot be folded")
        if num_classes < 1 or in_chans < 1 or not 0 < width <= 16:
            raise ValueError("num_classes and in_chans are at least 1, width is above 0 and at most 16")
        widths = list(widths or member.layer_widths(width))
        if len(widths) != 1 + sum(member.depths) or min(widths) < 1:
            raise ValueError(f"widths are the channels of {1 + sum(member.depths)} layers, at least 1 each")
        strides, dilations = _strides_and_dilations(output_stride, small_input)
        make = deploy_conv if deploy else make
        plain = 0 if dilated_layers is None else 1 + sum(member.depths) - dilated_layers  # first layers, which do not dilate

        def layer(in_channels: int, stage: int, first: bool, index: int) -> Layer:
            out = widths[index - 1]
            groups = member.groups if index % 2 else 1  # the 3rd, 5th, ... layer, counting the stem as the 1st
            groups = 1 if index == 1 else groups
            stride = strides[stage] if first else 1
            dilation = dilations[stage] if index > plain else 1
            return Layer(
                make(in_channels, out, stride, dilation, groups),
                SqueezeExcite(out) if member.squeeze_excite else nn.Identity(),
            )

        self.stem = layer(in_chans, 0, True, 1)
        stages, channels, index = [], widths[0], 1
        for stage, depth in enumerate(member.depths, 1):
            into, layers = channels, []
            for i in range(depth):
                index += 1
                layers.append(layer(channels, stage, i == 0, index))
                channels = widths[index - 1]
            in_pairs = member.residual and depth > 1
            stages.append(nn.Sequential(*(_reorganise(layers, into, channels, strides[stage], deploy) if in_pairs else layers)))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        self.num_features = channels
        self.checkpointing = False

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [N, num_features, H / output_stride, W / output_stride] (rounded up)."""
        return self.forward_intermediates(x)[-1]

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """Feature maps of the five stages of Table 2 (the stem is the first); of `indices` alone, or of the last n."""
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
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new, untrained classifier of `num_classes` outputs in place of the old one."""
        old = self.head
        self.head = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input in training and compute the rest again in the backward pass."""
        self.checkpointing = enable

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            out: Tensor = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _restored_buffers(layer)))
            return out
        return layer(x)  # type: ignore[no-any-return]


def _reorganise(layers: list[Layer], into: int, channels: int, stride: int, deploy: bool) -> list[Residual]:
    """Each two layers of a stage as a residual block; where the first changes the shape, a 1x1 with batch norm is the shortcut."""
    found: list[Residual] = []
    for i, (first, second) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        shortcut: nn.Module = nn.Identity()
        if i == 0 and (into != channels or stride != 1):
            shortcut = nn.Conv2d(into, channels, 1, stride) if deploy else Branches(conv=with_bn(Conv1x1(into, channels, stride)))
        found.append(Residual(first, second.block, shortcut))
    return found


@contextmanager
def _restored_buffers(layer: nn.Module) -> Iterator[None]:
    """Puts running statistics back, so that batch norms count a batch once though checkpointing computes it twice."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _strides_and_dilations(output_stride: int, small_input: bool) -> tuple[list[int], list[int]]:
    """Of the five stages. A stage that loses its stride doubles the dilation of every 3x3 from its first layer on."""
    strides = [1, 1, 2, 2, 2] if small_input else [2, 2, 2, 2, 2]
    dilations = [1, 1, 1, 1, 1]
    for stage in range(5)[{32: 5, 16: 4, 8: 3}[output_stride] :]:
        strides[stage] = 1
        dilations[stage] = dilations[stage - 1] * 2
    return strides, dilations


def is_deploy_form(model: nn.Module) -> bool:
    """Whether every layer's block is one plain convolution."""
    return all(type(m.block) is nn.Conv2d for m in model.modules() if isinstance(m, (Layer, Residual)))


def layer_list(model: nn.Module) -> list[dict[str, Any]] | None:
    """The operators of a deploy form in order, as model files list them (see checkpoint.py); None for any other model."""
    if isinstance(model, PlainNet):
        return model.layers
    if not isinstance(model, RepVGG) or not is_deploy_form(model) or any(isinstance(m, Residual) for m in model.modules()):
        return None
    layers: list[dict[str, Any]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer):
            continue
        conv = layer.block
        assert isinstance(conv, nn.Conv2d)
        has_se = isinstance(layer.se, SqueezeExcite)
        layers.append(
            {
                "op": "conv2d",
                **{name: getattr(conv, name) for name in ("in_channels", "out_channels", "groups")},
                **{name: list(getattr(conv, name)) for name in ("kernel_size", "stride", "padding", "dilation")},
                "activation": None if has_se else "relu",
                "weight": f"{path}.block.weight",
                "bias": f"{path}.block.bias",
            }
        )
        if has_se:
            layers.append({"op": "squeeze_excite", "activation": "relu", "path": f"{path}.se", "channels": conv.out_channels})
    if not isinstance(model.head, nn.Linear):  # a backbone
        return layers
    head = {"in_features": model.head.in_features, "out_features": model.head.out_features}
    return [*layers, {"op": "global_avg_pool"}, {"op": "linear", **head, "weight": "head.weight", "bias": "head.bias"}]


class PlainNet(nn.Module):
    """A deploy form built from its list of layers alone, whatever architecture it once had (a pruned net, a backbone)."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        self.layers = layers
        self.steps: list[tuple[str, str | None]] = []
        for spec in layers:
            path = spec["path"] if spec["op"] == "squeeze_excite" else str(spec.get("weight", "")).removesuffix(".weight")
            if spec["op"] == "conv2d":
                geometry = (spec["kernel_size"], spec["stride"], spec["padding"], spec["dilation"], spec["groups"])
                self._place(path, nn.Conv2d(spec["in_channels"], spec["out_channels"], *geometry))
            elif spec["op"] == "squeeze_excite":
                self._place(path, SqueezeExcite(spec["channels"]))
            elif spec["op"] == "linear":
                self._place(path, nn.Linear(spec["in_features"], spec["out_features"]))
            elif spec["op"] != "global_avg_pool":
                raise ValueError(f"no operator {spec['op']!r}")
            if spec.get("activation") not in (None, "relu"):
                raise ValueError(f"no activation {spec['activation']!r}")
            self.steps.append((path, spec.get("activation")))

    def forward(self, x: Tensor) -> Tensor:
        for path, activation in self.steps:
            x = self.get_submodule(path)(x) if path else x.mean((2, 3))
            x = x.relu() if activation else x
        return x

    def _place(self, path: str, module: nn.Module) -> None:
        """`set_submodule`, making the containers on the way, so that parameters are called what the list calls them."""
        parent: nn.Module = self
        *containers, name = path.split(".")
        for container in containers:
            if container not in parent._modules:
                parent.add_module(container, nn.Module())
            parent = parent.get_submodule(container)
        parent.add_module(name, module)
