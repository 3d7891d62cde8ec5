"""The network.

    stem, then four stages of 3x3 layers, the first of each with stride 2; global average pooling; a linear classifier.

`create_model` of zoo.py builds the members of names.py. Source: RepVGG (CVPR 2021), Tables 2 and 3.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repvgg.fold.as_linear import Branches
from repvgg.fold.blocks import UNFOLDABLE, Conv1x1, SqueezeExcite, deploy_conv, find_block, with_bn
from repvgg.models.names import Member
from repvgg.models.plan import LayerSpec, feature_info, layer_plan, taps


class Layer(nn.Module):
    """`act(se(block(x)))`; the block is one 3x3 convolution in deploy form."""

    def __init__(self, block: nn.Module, se: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.se = se
        self.act = nn.ReLU(inplace=True)  # nothing else reads what the block returns

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.block(x)))  # type: ignore[no-any-return]


class PlusLayer(Layer):
    """`se(act(block(x)))`, as in RepVGGplus."""

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.act(self.block(x)))  # type: ignore[no-any-return]


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


class Mean(nn.Module):
    """Take the mean over all places, as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class RepVGG(nn.Module):
    """A RepVGG classifier: images [N, in_chans, H, W] -> logits [N, num_classes], any H and W.

    Methods and attributes are those of timm's networks. num_classes 0: the pooled features [N, num_features]. global_pool: "avg";
    with num_classes 0 also "", for the feature map itself. drop_rate: of a dropout before the classifier, in training.

    A RepVGGplus returns a tuple in train mode: the logits, and those of its auxiliary heads, which its deploy form does not have.

    output_stride: 32, or 16 or 8, where the last one or two stages keep their resolution and dilate every 3x3 instead; of all the
    network's layers only the last `dilated_layers`, if given.
    small_input: stem and first stage at stride 1, for images of some 32 pixels. block: a name in `BLOCKS`; None for the member's.
    widths: channels of each layer, the stem's first, where a network was pruned; None for the member's.
    """

    training_only = ("auxiliary",)

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
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        block = block or member.block
        make = find_block(block)
        if deploy and block in UNFOLDABLE:
            raise ValueError(f"the block {block} has no deploy form: it cannot be folded")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}: at least 1, or 0 for a backbone")
        _refuse_pool(global_pool, num_classes)
        if not isinstance(drop_rate, int | float) or not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate!r}: from 0 to below 1")
        plan = layer_plan(member, in_chans, output_stride, width, small_input, dilated_layers, widths)
        make = deploy_conv if deploy else make

        def layer(spec: LayerSpec) -> Layer:
            block = make(spec.in_channels, spec.out_channels, spec.stride, spec.dilation, spec.groups)
            se = SqueezeExcite(spec.out_channels, member.reduction) if member.squeeze_excite else nn.Identity()
            return (PlusLayer if member.plus else Layer)(block, se)

        def stage(specs: list[LayerSpec]) -> nn.Sequential:
            layers = [layer(spec) for spec in specs]
            return nn.Sequential(*(_in_pairs(layers, specs, deploy) if member.residual and len(layers) > 1 else layers))

        stem, *stages = ([spec for spec in plan if spec.stage == number] for number in range(5))
        self.stem = layer(stem[0])
        self.stages = nn.Sequential(*(stage(specs) for specs in stages))
        self.num_features = self.head_hidden_size = plan[-1].out_channels
        self.feature_info = feature_info(plan)
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.head: Any = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.taps = taps(plan) if member.plus else {}
        self.auxiliary = self._auxiliary_heads(0 if deploy else num_classes)
        self.checkpointing = False

    @property
    def num_classes(self) -> int:
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, [N, num_features, H / output_stride, W / output_stride] (rounded up)."""
        for stage in (self.stem, *self.stages):
            x = self._run_stage(stage, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last feature map and a list of those of the five stages of Table 2 (the stem's first), as timm's networks do.

        indices: some of the stages, or the last n; the list is in the network's order. stop_early: nothing after the last of these
        is run, and its map takes the last one's place. intermediates_only: the list alone. norm: nothing is left to normalise here.
        Raises ValueError for a stage that is not there, or another order of dimensions than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: a convolutional network's is NCHW")
        stages = (self.stem, *self.stages)
        wanted = _chosen(indices, len(stages))
        features = []
        for number, stage in enumerate(stages[: max(wanted) + 1] if stop_early else stages):
            x = self._run_stage(stage, x)
            if number in wanted:
                features.append(x)
        return features if intermediates_only else (x, features)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a last feature map; pre_logits: what the classifier would see."""
        x = features.mean((2, 3)) if self.global_pool else features
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        if self.auxiliary is not None and self.training:
            return self._with_auxiliary(self.auxiliary, x)
        return self.forward_head(self.forward_features(x))

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles in place of a deploy form: the same modules in a row, by the same names."""
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=self.stem, stages=self.stages)
        if self.global_pool:
            parts["pool"] = Mean()
        return nn.Sequential(parts | OrderedDict(head=self.head)).train(self.training)

    def _with_auxiliary(self, heads: nn.ModuleDict, x: Tensor) -> tuple[Tensor, ...]:
        after = {number: heads[name] for name, (number, _) in self.taps.items()}
        outputs = []
        for number, layer in enumerate((self.stem, *(layer for stage in self.stages for layer in stage))):  # type: ignore[attr-defined]
            x = self._run(layer, x)
            if number in after:
                outputs.append(after[number](x))
        return (self.forward_head(x), *outputs)

    def _auxiliary_heads(self, num_classes: int) -> nn.ModuleDict | None:
        if not self.taps or not num_classes:
            return None
        return nn.ModuleDict({name: _auxiliary_head(channels, num_classes) for name, (_, channels) in self.taps.items()})

    def get_classifier(self) -> nn.Module:
        return self.head  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, untrained classifier of `num_classes` outputs in place of the old one; 0 leaves a backbone.

        global_pool: as the constructor takes it; None keeps what there is, but for what a classifier needs.
        """
        pool = ("avg" if num_classes else self.global_pool) if global_pool is None else global_pool
        _refuse_pool(pool, num_classes)
        like = next(self.parameters())
        place = {"device": like.device, "dtype": like.dtype}
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.auxiliary = self._auxiliary_heads(0 if is_deploy_form(self) else num_classes)
        self.global_pool = pool
        for part in filter(None, (self.head, self.auxiliary)):
            part.to(**place).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input in training and compute the rest again in the backward pass."""
        self.checkpointing = enable

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        for layer in stage if isinstance(stage, nn.Sequential) else (stage,):
            x = self._run(layer, x)
        return x

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            out: Tensor = checkpoint(layer, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, layer))
            return out
        return layer(x)  # type: ignore[no-any-return]


def _refuse_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool is {global_pool!r}: 'avg', or '' for the feature map as it is")
    if num_classes and not global_pool:
        raise ValueError("global_pool is '', which goes with num_classes=0: a classifier reads the mean of the feature map")


def _chosen(indices: int | Sequence[int] | None, count: int) -> set[int]:
    """Return which of so many stages are meant: None all, n the last n; a negative index counts from the end."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        if not 0 < last <= count:
            raise ValueError(f"the last {indices} of {count} stages: at least 1, at most {count}")
        return set(range(count - last, count))
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(f"indices {list(indices)}: there are stages 0 to {count - 1}")
    return {i % count for i in indices}


def _auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            bn=nn.BatchNorm2d(channels),
            act=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(channels, num_classes),
        )
    )


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


def checkpoint_contexts(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed layer's two computations, of which batch norms count the first alone."""
    return nullcontext(), _restored_buffers(layer)


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
