"""Measure how far outputs are from a reference, and what rounding does to them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Error:
    """Measure the distance of outputs from a reference: the largest, relative to the largest output; and relative to the outputs'
    mean standard deviation across images, because a net whose outputs hardly depend on its input looks perfect by the first."""

    relative: float
    of_deviation: float

    def times(self, factor: float) -> "Error":
        return Error(factor * self.relative, factor * self.of_deviation)

    def within(self, bound: "Error") -> bool:
        """Tell whether both are finite and at most the bound's."""
        return (
            math.isfinite(self.relative)
            and self.relative <= bound.relative
            and not self.of_deviation > bound.of_deviation
            and not math.isnan(self.of_deviation)
        )

    @staticmethod
    def worst(errors: "list[Error]") -> "Error":
        return Error(max(e.relative for e in errors), max(e.of_deviation for e in errors))


def distance(got: list[Tensor], wanted: list[Tensor]) -> Error:
    """Return how far outputs are from a reference. Raises `ReparamError` where they differ in number or shape."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        raise ReparamError("the two models' outputs differ in number or shape")
    if not wanted:
        raise ReparamError("the models return no tensors of floating point to compare")
    off = [_largest(g.double() - w) for g, w in zip(got, wanted, strict=True)]
    return Error(max(map(_ratio, off, map(_largest, wanted))), max(map(_ratio, off, map(_deviation, wanted))))


def shake(model: nn.Module, step: float, seed: int = 0) -> nn.Module:
    """Change each number that a model holds by `step`, relatively, up or down; in place."""
    for i, tensor in enumerate((*model.parameters(), *model.buffers())):
        if tensor.is_floating_point():
            tensor.copy_(shaken(tensor, step, seed + i))
    return model


def shaken(value: Any, step: float, seed: int = 0) -> Any:
    """Return tensors, or a tree of them, with each number changed by `step`, relatively, up or down."""
    random = torch.Generator().manual_seed(seed)

    def moved(t: Any) -> Any:
        if not is_float(t):
            return t
        up = torch.randint(0, 2, t.shape, generator=random, dtype=torch.int8, device="cpu").to(t.device)
        return t * (1 + step * (2 * up - 1).to(t.dtype))

    return torch.utils._pytree.tree_map(moved, value)


def at_least(own: Error, wanted: list[Tensor], roundoff: float) -> Error:
    """Raise a measured error to one rounding of the largest number, which no result is nearer than."""
    spread = max((_ratio(_largest(w), _deviation(w)) for w in wanted), default=0.0)
    return Error(max(own.relative, roundoff), max(own.of_deviation, roundoff * spread))


def alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return [t.shape for t in some] == [t.shape for t in others]


def tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors in what a model returns: trees of containers, dataclasses and mappings of any kind."""
    found = []
    for leaf in torch.utils._pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


def floats(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if is_float(t)]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _deviation(t: Tensor) -> float:
    """Return the mean standard deviation across images; of one image alone, its largest number."""
    return float(t.double().std(dim=0).mean()) if t.dim() and len(t) > 1 else _largest(t)


def _ratio(error: float, size: float) -> float:
    if error != error:
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))
