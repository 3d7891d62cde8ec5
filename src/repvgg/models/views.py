"""Show an image to a segmentation network: whole or in overlapping windows, at one scale or several, mirrored too.

What an image is shown as is a `Views`; the class probabilities of all views are averaged. One view is not averaged with anything.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.numerics import full_float32

STEP = 2 / 3  # of a window, between one and the next, as in the original PSPNet
LARGEST_SCALE = 8


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
    if views.one:
        return _to_size(network(images), size)
    total: Tensor | None = None
    for scale in views.scales:
        scaled = _to_size(images, (max(1, round(images.shape[2] * scale)), max(1, round(images.shape[3] * scale))))
        for mirrored in (False, True) if views.flip else (False,):
            shown = scaled.flip(3) if mirrored else scaled
            seen = _through_windows(network, shown, window) if views.slide else network(shown).softmax(1)
            probabilities = _to_size(seen.flip(3) if mirrored else seen, size)
            total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    mean = total.div_(len(views.scales) * (2 if views.flip else 1))
    return mean.clamp_(min=torch.finfo(mean.dtype).tiny).log_()


def _through_windows(network: Callable[[Tensor], Tensor], x: Tensor, window: Sequence[int]) -> Tensor:
    """Return probabilities, averaged where windows overlap."""
    height, width = (min(w, n) for w, n in zip(window, x.shape[2:], strict=True))
    total: Tensor | None = None
    count = x.new_zeros(x.shape[2:])
    for top in starts(x.shape[2], height):
        for left in starts(x.shape[3], width):
            there = (..., slice(top, top + height), slice(left, left + width))
            seen = network(x[there]).softmax(1)
            total = seen.new_zeros(*seen.shape[:2], *x.shape[2:]) if total is None else total
            total[there] += seen
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
