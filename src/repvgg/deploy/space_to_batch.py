"""Dilated convolutions run as plain ones, exactly.

With dilation d, rows and columns whose numbers differ by anything else than a multiple of d never meet. So a dilated 3x3 is a plain
3x3 on d*d interleaved images, each a d-th as high and wide: what a library has for plain convolutions (Winograd) serves for it too.

    fast = space_to_batch(reparameterize(model))

Layers of one dilation in a row go there and back together. The result is for running, not for saving: the file of the deploy form
holds the same weights.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.models.repvgg import Layer


class SpaceToBatch(nn.Module):
    """`layers`, plain ones that keep the size, on each of dilation^2 interleaved images: [N, C, H, W] -> [N, C', H, W]."""

    def __init__(self, layers: nn.Sequential, dilation: int) -> None:
        super().__init__()
        self.layers: nn.Sequential = layers
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        edge = (0, -width % self.dilation, 0, -height % self.dilation)
        inside = None
        if any(edge) and len(self.layers) > 1:  # what is beyond the edge is zero for every layer, as padding is
            inside = to_batch(F.pad(x.new_ones(1, 1, height, width), edge), self.dilation).repeat(x.shape[0], 1, 1, 1)
        x = to_batch(F.pad(x, edge) if any(edge) else x, self.dilation)
        for i, layer in enumerate(self.layers):
            x = layer(x if inside is None or i == 0 else x * inside)
        return to_space(x, self.dilation)[..., :height, :width]


def to_batch(x: Tensor, d: int) -> Tensor:
    """Turn [N, C, H, W] into [N d d, C, H / d, W / d], in the same memory format; d divides H and W."""
    if _channels_last(x):
        return _to_batch(x.movedim(1, 3), d, 1).movedim(3, 1)
    return _to_batch(x, d, 2)


def to_space(x: Tensor, d: int) -> Tensor:
    """Undo `to_batch`."""
    if _channels_last(x):
        return _to_space(x.movedim(1, 3), d, 1).movedim(3, 1)
    return _to_space(x, d, 2)


def _to_batch(x: Tensor, d: int, rows: int) -> Tensor:
    """`rows`, and columns after it: the axes of the image."""
    phases: Tensor = x.unflatten(rows + 1, (-1, d)).unflatten(rows, (-1, d)).movedim((rows + 1, rows + 3), (1, 2))
    return phases.flatten(0, 2)


def _to_space(x: Tensor, d: int, rows: int) -> Tensor:
    phases: Tensor = x.unflatten(0, (-1, d, d)).movedim((1, 2), (rows + 1, rows + 3))
    return phases.flatten(rows + 2, rows + 3).flatten(rows, rows + 1)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def space_to_batch(model: nn.Module) -> nn.Module:
    """Return a copy whose dilated convolutions run so, layers of ours in deploy form whole. Raises ValueError if there are none."""
    rebuilt = _rebuilt(copy.deepcopy(model))
    if not any(isinstance(m, SpaceToBatch) for m in rebuilt.modules()):
        raise ValueError(f"{type(model).__name__} has no dilated convolution to run by space-to-batch")
    vars(rebuilt).pop("manifest", None)
    return rebuilt


def _rebuilt(module: nn.Module) -> nn.Module:
    if d := _dilation(module):
        return SpaceToBatch(nn.Sequential(_undilated(module)), d)
    for name, child in module.named_children():
        module._modules[name] = _rebuilt(child)
    return _joined(module) if type(module) is nn.Sequential else module


def _joined(layers: nn.Sequential) -> nn.Sequential:
    """Neighbours of one dilation make one stay in the batch."""
    found: list[nn.Module] = []
    for layer in layers.children():
        last = found[-1] if found else None
        if isinstance(layer, SpaceToBatch) and isinstance(last, SpaceToBatch) and last.dilation == layer.dilation:
            last.layers = nn.Sequential(*last.layers.children(), *layer.layers.children())
        else:
            found.append(layer)
    return nn.Sequential(*found).train(layers.training) if len(found) < len(layers) else layers


def _dilation(module: nn.Module) -> int | None:
    """Return the dilation, above 1 and the same both ways, of a convolution that keeps the size, or a layer of ours with one."""
    if isinstance(module, Layer):
        return _dilation(module.block) if type(module.se) is nn.Identity else None
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return None
    d = module.dilation[0]
    keeps_size = all(module.padding[i] == d * (module.kernel_size[i] - 1) / 2 for i in (0, 1))  # type: ignore[operator]
    return d if d > 1 and module.dilation == (d, d) and module.stride == (1, 1) and keeps_size else None


def _undilated(module: Any) -> nn.Module:
    conv: Any = module.block if isinstance(module, Layer) else module
    conv.dilation, conv.padding = (1, 1), tuple((k - 1) // 2 for k in conv.kernel_size)
    return module  # type: ignore[no-any-return]
