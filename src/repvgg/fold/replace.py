"""Foldable blocks in any network, in place of its 3x3 convolutions.

model = replace_conv(timm.create_model("resnet50", pretrained=True), block="repvgg")      # computes the same
print(model.replace_report)                                                             # what was replaced, what was left and why
...                                                                                     # go on training
deploy = reparameterize(model.eval())                                                   # the blocks are out again
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError, compose
from repvgg.fold.as_linear import (
    CONVOLUTIONS,
    Branches,
    Chain,
    as_linear,
    conv_padding,
    is_batch_norm,
    is_foldable,
    split_activation,
    why_unknown,
)
from repvgg.fold.blocks import DerivedConv, find_block
from repvgg.fold.guards import altered, copied, inside, refuse_uncopyable
from repvgg.fold.proof import check_part
from repvgg.fold.seen import Traces
from repvgg.fold.stretches import partners
from repvgg.fold.trace import refuse_lost, trace


@dataclass
class ReplaceReport:
    """Tell what `replace_conv` did: paths of the convolutions replaced, of the batch norms that went into the blocks with them,
    and of the convolutions left, with the reason."""

    replaced: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} convolutions, {len(self.norms)} of them with their batch norm"]
        for reason in dict.fromkeys(self.left.values()):
            paths = [path or "(the model)" for path, why in self.left.items() if why == reason]
            shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
            lines.append(f"left {shown}: {reason}")
        return "\n".join(lines)


@torch.no_grad()
def replace_conv(model: nn.Module, block: str = "repvgg", fresh: bool = False) -> nn.Module:
    """Return a copy of any network that computes the same, with foldable blocks in place of its 3x3 convolutions.

    A convolution qualifies with any channels, groups (depthwise too), stride and dilation, if it pads by its dilation. A batch norm
    that it alone feeds goes into the block with it. What there was becomes the block's 3x3 branch, minus what the other branches
    contribute; and those that end in a batch norm begin with a weight of zero there, so that in train mode too the network is
    what it was (unless the block is `identity_no_bn` or `qarepvgg`, whose identity cannot be silent, or there was no batch norm).
    Each block is verified alone, in float64. `reparameterize` takes the blocks out again; `replace_report` of the result says what
    qualified and what did not.

    fresh: blocks as they are initialised, for training from the start; the network then computes something else.

    Raises ValueError for an unknown block, `ReparamError` for one that is not linear, a tensor that is not finite, a
    negative running variance, or a network that reaches its convolutions in other ways than calling them. Warns where nothing was
    replaced because the network's forward cannot be followed.
    """
    make = find_block(block)
    refuse_uncopyable(model)
    model = copied(model)
    vars(model).pop("manifest", None)  # a file of it would no longer be what `create_model` makes
    modes, report = (trace(model), trace(_still(model))), ReplaceReport()  # it is trained and evaluated
    norm_paths = dict(partners(model, modes[0]).items() & partners(model, modes[1]).items())
    in_blocks = {part for module in model.modules() if is_foldable(module) for part in module.modules()}
    for path, conv in list(model.named_modules()):
        if not isinstance(conv, nn.modules.conv._ConvNd):
            continue
        try:
            if conv in in_blocks:
                raise ReparamError("is part of a block that folds")
            if reason := _why_not(path, modes):
                raise ReparamError(reason)
            new = make(*_geometry(conv))
        except ReparamError as error:
            report.left[path] = error.reason
            continue
        assert isinstance(conv, nn.Conv2d)
        norm = _partner(model, norm_paths.get(path, ""), modes)
        if not fresh:
            with inside(path):
                _take_over(new.to(conv.weight.device, torch.float64), conv, norm)
        model = _place(model, path, _like(new, conv, norm))
        report.replaced.append(path)
        if norm is not None:
            model.set_submodule(norm_paths[path], split_activation(norm)[1].train(norm.training))
            report.norms.append(norm_paths[path])
    if not report.replaced and (why := next((traces.untraceable[""] for traces in modes if "" in traces.untraceable), "")):
        remedy = "give the parts that can be, as in model.backbone = replace_conv(model.backbone)"
        said = f"{type(model).__name__}: its forward cannot be followed ({why}), so nothing was replaced: {remedy}"
        warnings.warn(said, stacklevel=2)  # whoever does not read the report would train without blocks
    refuse_lost(model, modes[0], "replaced")
    model.replace_report = report  # type: ignore[assignment]
    return model


def _still(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode."""
    copy_ = copied(model, share_tensors=True)
    for module in copy_.modules():
        module.training = False
    return copy_


def _why_not(path: str, modes: tuple[Traces, ...]) -> str | None:
    """Return why no block can take this module's place, in train mode or in eval mode, if so."""
    return next(filter(None, (traces.why_not_replaced(path) for traces in modes)), None)


def _geometry(conv: nn.Module) -> tuple[Any, ...]:
    """Return the geometry as blocks take it. Raises `ReparamError` where no block can take this convolution's place."""
    if not isinstance(conv, nn.Conv2d):
        raise ReparamError(f"is a {type(conv).__name__}")
    if type(conv) not in CONVOLUTIONS:
        raise ReparamError(why_unknown(conv))
    if reason := altered(conv):
        raise ReparamError(reason)
    if conv.kernel_size != (3, 3):
        raise ReparamError(f"is {conv.kernel_size[0]}x{conv.kernel_size[1]}")
    if len(set(conv.stride)) > 1 or len(set(conv.dilation)) > 1:
        raise ReparamError("has one stride or dilation down and another across")
    if (padding := conv_padding(conv)) != conv.dilation:
        raise ReparamError(f"pads by {padding[0]}, where a block pads by its dilation, {conv.dilation[0]}")
    return conv.in_channels, conv.out_channels, conv.stride[0], conv.dilation[0], conv.groups, conv.padding_mode


def _partner(model: nn.Module, path: str, modes: tuple[Traces, ...]) -> nn.BatchNorm2d | None:
    """Return the batch norm at `path`, if it can go into a block: it trains (a frozen one does not) and is as its type says."""
    norm = model.get_submodule(path) if path else None
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or not is_batch_norm(norm) or norm.running_mean is None:
        return None
    return None if altered(norm) or _why_not(path, modes) else norm  # type: ignore[return-value]


def _take_over(block: nn.Module, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
    """Set a fresh block in float64 to compute what `conv`, and then `norm`, compute in eval mode.

    With its fresh statistics and a weight of sqrt(1 + eps), a batch norm is the identity; with a weight of zero it is silent. So
    once the other branches are as silent as they can be, the main branch's kernel is what was there minus what they still give.
    """
    as_linear.read(block)  # refuses what is not linear, by name
    body = block[0] if isinstance(block, Chain) else block
    if not isinstance(body, Branches):
        raise ReparamError(f"a {type(block).__name__} cannot take over: blocks are Branches, or a Chain that begins with them")
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.fill_(math.sqrt(1 + m.eps))
    main, *others = body.children()
    for other in others:
        if (last := _last_norm(other)) is not None:
            last.weight.zero_()
    kernel = next((m for m in main.modules() if isinstance(m, nn.Conv2d)), None)
    outlet = _last_norm(main if block is body else block)
    if outlet is None or kernel is None or kernel.kernel_size != (3, 3):
        raise ReparamError("cannot take over: the block's first branch is to be a 3x3 convolution, with a batch norm after it")
    _set_kernel(kernel, torch.zeros_like(kernel.weight))
    rest = as_linear.read(body)

    wanted = whole = as_linear.read(conv)
    if norm is not None:
        whole = compose(wanted, as_linear.read(split_activation(norm)[0]))
        if block is not body or not rest.kernel.any():  # all that the block gives goes through `outlet`, as it did through `norm`
            _copy_norm(norm, outlet)
        else:
            wanted = whole
    _set_kernel(kernel, wanted.kernel - rest.kernel)
    assert outlet.running_mean is not None
    outlet.running_mean -= wanted.bias - rest.bias
    check_part(block.eval(), whole)


def _last_norm(module: nn.Module) -> nn.BatchNorm2d | None:
    """Return the batch norm that a branch ends in."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return module if isinstance(module, nn.BatchNorm2d) else None


def _set_kernel(conv: nn.Conv2d, kernel: Tensor) -> None:
    if isinstance(conv, DerivedConv):
        conv.set_kernel(kernel)
    else:
        conv.weight.copy_(kernel)


def _copy_norm(norm: nn.BatchNorm2d, to: nn.BatchNorm2d) -> None:
    to.eps, to.momentum = norm.eps, norm.momentum
    to.weight.fill_(1) if norm.weight is None else to.weight.copy_(norm.weight)
    to.bias.zero_() if norm.bias is None else to.bias.copy_(norm.bias)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        getattr(to, name).copy_(getattr(norm, name))


def _like(new: nn.Module, conv: nn.Conv2d, norm: nn.Module | None) -> nn.Module:
    """Put a block in the dtype, device, memory format and mode of what it replaces; frozen, and synchronised, where that was."""
    weight = conv.weight
    new = new.to(weight).train(conv.training).requires_grad_(weight.requires_grad)
    if norm is not None and isinstance(norm.weight, Tensor):
        for inner in (m for m in new.modules() if isinstance(m, nn.BatchNorm2d)):
            inner.requires_grad_(norm.weight.requires_grad)
    if isinstance(norm, nn.SyncBatchNorm):
        new = nn.SyncBatchNorm.convert_sync_batchnorm(new, norm.process_group)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        new = new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return new


def _place(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    if not path:
        return new
    model.set_submodule(path, new)
    return model
