"""Show an image to a segmentation network: whole or in overlapping windows, at one scale or several, mirrored too.

What an image is shown as is a `Views`; the class probabilities of all views are averaged. One view is not averaged with anything.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.numerics import full_float32

STEP = 2 / 3  # of a window, between one and the next, as in the original PSPNet
LARGEST_SCALE = 8
AT_ONCE = 1 << 27  # scores that are upsampled at once: 0.5 GB


@dataclass(frozen=True)
class Views:
    """The views of one image whose probabilities are averaged.

    slide: windows of the size that the model was trained with, which overlap by a third, instead of the whole image. scales: of
    the image's size. flip: mirrored too."""

    slide: bool = False
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= LARGEST_SCALE for scale in self.scales):
            raise ValueError(f"scales are above 0 and at most {LARGEST_SCALE}, not {self.scales}")

    @property
    def one(self) -> bool:
        return not self.slide and not self.flip and self.scales == (1.0,)


WHOLE = Views()


def segment(
    network: Callable[[Tensor], Tensor], images: Tensor, size: tuple[int, int], window: Sequence[int], views: Views = WHOLE
) -> Tensor:
    """Return the scores [N, classes, *size] of normalised images [N, C, H, W]: logits of one view, log-probabilities of several.

    window: height and width, for `views.slide`.
    """
    return _combined(seen(network, images, window, views), size, views)


def seen(network: Callable[[Tensor], Tensor], images: Tensor, window: Sequence[int], views: Views = WHOLE) -> list[Tensor]:
    """Return what a network says of each view, at that view's size: logits of one, probabilities of several (see `segment`)."""
    if views.one:
        return [network(images)]
    maps = []
    for scale in views.scales:
        scaled = _to_size(images, (max(1, round(images.shape[2] * scale)), max(1, round(images.shape[3] * scale))))
        for mirrored in (False, True) if views.flip else (False,):
            shown = scaled.flip(3) if mirrored else scaled
            found = _through_windows(network, shown, window) if views.slide else network(shown).softmax(1)
            maps.append(found.flip(3) if mirrored else found)
    return maps


def likeliest(maps: Sequence[Tensor], size: tuple[int, int], views: Views = WHOLE) -> Tensor:
    """Return the likeliest class of each pixel, uint8 [*size] on the CPU, of what was `seen` in one image.

    The scores of a large photo are made strip by strip: those of 19 classes and 100 megapixels would take 8 GB.
    """
    rows = max(1, AT_ONCE // (maps[0].shape[1] * size[1]))
    if rows >= size[0]:
        return _combined(maps, size, views)[0].argmax(0).to(torch.uint8).cpu()
    edges = [(top, min(top + rows, size[0])) for top in range(0, size[0], rows)]
    strips = (functools.reduce(torch.add, (_rows(m, size, *edge) for m in maps)) for edge in edges)
    return torch.cat([strip[0].argmax(0).to(torch.uint8).cpu() for strip in strips])


def _combined(maps: Sequence[Tensor], size: tuple[int, int], views: Views) -> Tensor:
    if views.one:
        return _to_size(maps[0], size)
    total = _to_size(maps[0], size).clone()
    for found in maps[1:]:
        total.add_(_to_size(found, size))
    mean = total.div_(len(maps))
    return mean.clamp_(min=torch.finfo(mean.dtype).tiny).log_()


def _rows(x: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Return rows `top` to `bottom` of `_to_size(x, size)`, up to rounding."""
    y = ((torch.arange(top, bottom, device=x.device, dtype=torch.float64) + 0.5) * (x.shape[2] / size[0]) - 0.5).clamp(min=0)
    low = y.long().clamp(max=x.shape[2] - 1)
    between = torch.lerp(x[:, :, low], x[:, :, (low + 1).clamp(max=x.shape[2] - 1)], (y - low)[:, None].to(x.dtype))
    return _to_size(between, (bottom - top, size[1]))


def _through_windows(network: Callable[[Tensor], Tensor], x: Tensor, window: Sequence[int]) -> Tensor:
    """Return probabilities, averaged where windows overlap."""
    height, width = (min(w, n) for w, n in zip(window, x.shape[2:], strict=True))
    total: Tensor | None = None
    count = x.new_zeros(x.shape[2:])
    for top in starts(x.shape[2], height):
        for left in starts(x.shape[3], width):
            there = (..., slice(top, top + height), slice(left, left + width))
            found = network(x[there]).softmax(1)
            total = found.new_zeros(*found.shape[:2], *x.shape[2:]) if total is None else total
            total[there] += found
            count[there] += 1
    assert total is not None
    return total.div_(count)


def starts(length: int, window: int) -> list[int]:
    """Return where windows begin, so that they cover all and overlap by a third at least."""
    step = math.ceil(window * STEP)
    number = math.ceil(max(0, length - window) / step) + 1
    return [min(i * step, length - window) for i in range(number)]


def _to_size(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def placed(model: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    """Return the model on a device, in eval mode: normalised images in, scores in float32 at least."""
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    dtype = next(model.parameters()).dtype

    def network(x: Tensor) -> Tensor:
        full_float32(x.device)
        scores: Tensor = model(x.to(dtype, memory_format=torch.channels_last))
        return scores if dtype == torch.float64 else scores.float()

    return network
