"""Prove that a fold computes the same: each part alone, and the whole model, against the original in float64."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, ReparamError
from repvgg.fold.guards import refuse_train_mode, refuse_uncopyable

PART_BOUND = 1e-10  # relative error of one folded part in float64; rounding alone is some 1e-15
# Relative error of a whole model against float64, by the precision of its parameters.
MODEL_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same error measured against the deviation of the outputs across images, which a constant output cannot hide in.
DEVIATION_FACTOR = 100


@dataclass(frozen=True)
class Error:
    """Distance of outputs from the float64 reference: the largest, relative to the largest output; and relative to the outputs'
    mean standard deviation across images, because a net whose outputs hardly depend on its input looks perfect by the first."""

    relative: float
    of_deviation: float


@dataclass(frozen=True)
class Verification:
    """How well `b` stands for `a`. Both errors are against `a` in float64; `bound` holds for the relative one, a hundred times
    it for the other. `a`'s own rounding in the same precision is measured too: `b` may always be three times as far off."""

    error: Error
    own: Error
    bound: float
    dtype: torch.dtype

    @property
    def max_rel_err(self) -> float:
        return self.error.relative

    @property
    def ok(self) -> bool:
        return (
            math.isfinite(self.error.relative)  # where a's own rounding is infinite too, nothing is proved
            and self.error.relative <= max(self.bound, 3 * self.own.relative)
            and self.error.of_deviation <= max(DEVIATION_FACTOR * self.bound, 3 * self.own.of_deviation)
        )

    def __str__(self) -> str:
        return (
            f"{'equal' if self.ok else 'NOT EQUAL'} in {str(self.dtype).removeprefix('torch.')}: relative error "
            f"{self.error.relative:.1e} (bound {self.bound:.0e}; the original's own rounding {self.own.relative:.1e}), "
            f"{self.error.of_deviation:.1e} of the deviation across images (own {self.own.of_deviation:.1e})"
        )


@torch.no_grad()
def verify(a: nn.Module, b: nn.Module, input_size: tuple[int, int, int], images: int = 4, seed: int = 0) -> Verification:
    """Compare two models on random images [images, *input_size]: `b` in its own precision against `a` in float64.

    Both must be in eval mode (`ReparamError` otherwise) and on one device. Outputs may be tensors or trees of tensors.
    """
    if images < 2:
        raise ValueError(f"images is {images}: the deviation across images needs at least 2")
    for model in (a, b):
        refuse_train_mode(model)
    refuse_uncopyable(a)
    like = next(b.parameters())
    x = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(like.dtype).to(like.device)  # rounded first, so that all see the same images
    reference = _tensors(copy.deepcopy(a).double()(x.double()))
    own = _tensors(copy.deepcopy(a).to(like.dtype)(x))
    return Verification(distance(_tensors(b(x)), reference), distance(own, reference), MODEL_BOUND[like.dtype], like.dtype)


def distance(got: list[Tensor], wanted: list[Tensor]) -> Error:
    """Of outputs from the float64 reference. Raises `ReparamError` where they differ in number or shape."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        raise ReparamError("the two models' outputs differ in number or shape")
    if not wanted:
        raise ReparamError("the models return no tensors of floating point to compare")
    off = [float((g.double() - w).abs().max()) for g, w in zip(got, wanted, strict=True)]
    size = [float(w.abs().max()) for w in wanted]
    deviation = [float(w.std(dim=0).mean()) for w in wanted]
    return Error(max(map(_ratio, off, size)), max(map(_ratio, off, deviation)))


def check_part(original: nn.Module, folded: LinearMap) -> float:
    """Relative float64 error of a module in eval mode, on noise just large enough for every tap, border and a second step."""
    geometry = zip(folded.kernel_size, folded.dilation, folded.stride, folded.padding, strict=True)
    size = [d * (k - 1) + 1 + 2 * s + p for k, d, s, p in geometry]
    noise = torch.Generator().manual_seed(folded.in_channels * 31 + folded.kernel_size[0])
    x = torch.randn(2, folded.in_channels, *size, generator=noise, dtype=torch.float64).to(folded.kernel.device)
    wanted, got = copy.deepcopy(original).double()(x), folded(x)
    error = _ratio(float((got - wanted).abs().max()), float(wanted.abs().max())) if wanted.shape == got.shape else float("inf")
    if error > PART_BOUND:
        raise ReparamError(f"its folded form differs by {error:.1e} (bound {PART_BOUND:.0e}); please report this")
    return error


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def _ratio(error: float, size: float) -> float:
    if error != error:
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))
