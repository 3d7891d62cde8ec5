"""Compare a whole folded model with its original, and find the part that is to blame where they differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.proof import Verification, compare

LARGEST = 64  # pixels a side of an example made here: a convolution is the same everywhere, and float64 is slow
IMAGES = 2


def example_of(model: nn.Module) -> tuple[Any, ...] | None:
    """Return random images that a model takes, if it knows its input size (`manifest`), else None."""
    manifest: Any = getattr(model, "manifest", None)
    if manifest is None:
        return None
    channels, *sides = manifest.preprocessing.input_size
    shape = IMAGES, channels, *(min(LARGEST, side) for side in sides)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"),)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """Return an example as the arguments of a call: a tuple is that already."""
    return example if isinstance(example, tuple) else (example,)


def check_whole(
    original: nn.Module,
    folded: nn.Module,
    inputs: tuple[Any, ...],
    parts: list[str],
    fold: Callable[[frozenset[str]], nn.Module],
) -> Verification:
    """Compare the models' outputs for `inputs`.

    parts: what was folded. fold: make the model again, with only some of them folded. Where the outputs differ, bisection finds the
    first part whose fold makes them differ, and a `ReparamError` names it.
    """
    device = next((t.device for t in (*original.parameters(), *original.buffers())), torch.device("cpu"))
    inputs = torch.utils._pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, inputs)
    found = compare(original, folded, inputs)
    if found.verdict != "NOT EQUAL":
        return found
    good, bad = 0, len(parts)  # with so many parts folded, the outputs are equal, or are not
    if compare(original, fold(frozenset()), inputs).verdict == "NOT EQUAL":
        raise ReparamError("gives another output when its copy is called, folded or not: is there something random in it?")
    while bad - good > 1:
        middle = (good + bad) // 2
        if compare(original, fold(frozenset(parts[:middle])), inputs).verdict == "NOT EQUAL":
            bad = middle
        else:
            good = middle
    raise ReparamError(f"the model computes something else once this is folded ({found}); please report this", parts[bad - 1])
