"""Compare two models step by step: after each module, both go on from what the original has computed there.

A network that multiplies small differences hides a wrong fold behind its own rounding. Step by step nothing is multiplied.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from repvgg.fold.rounding import EPSILON, Error, at_least, distance, floats, is_float, shake, shaken, tensors

Watch = Callable[[str, int, Tensor], Tensor | None]  # what to go on with after the module at a path gave this, for the n-th time


def stepwise(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...], multiple: float) -> tuple[Error, Error]:
    """Return how far `b` is from `a` at the output, and how far `a` is when its weights and input move by their last place.

    Both are in float64; `a` is changed. `b` goes on from the value of `a` after each module that gives the same within `multiple`
    times what the last place does to it; after others (a convolution that has taken up its batch norm) from its own.
    """
    common = dict(b.named_modules()).keys() - {""}
    there: dict[tuple[str, int], Tensor] = {}
    own: dict[tuple[str, int], float] = {}

    def remember(path: str, turn: int, out: Tensor) -> None:
        there[path, turn] = out.clone()

    def settle(path: str, turn: int, out: Tensor) -> Tensor | None:
        wanted = there.get((path, turn))
        if wanted is None or wanted.shape != out.shape:
            return None
        own[path, turn] = at_least(distance([out], [wanted]), [wanted], EPSILON / 2).relative
        return wanted.clone()

    def follow(path: str, turn: int, out: Tensor) -> Tensor | None:
        wanted = there.get((path, turn))
        if wanted is None or wanted.shape != out.shape or (path, turn) not in own:
            return None
        return wanted.clone() if distance([out], [wanted]).relative <= multiple * own[path, turn] else None

    with _watched(a, common, remember):
        wanted = floats(tensors(a(*inputs)))
    shake(a, EPSILON)
    with _watched(a, common, settle):
        moved = floats(tensors(a(*shaken(inputs, EPSILON))))
    with _watched(b, common, follow):
        got = floats(tensors(b(*inputs)))
    return distance(got, wanted), at_least(distance(moved, wanted), wanted, EPSILON / 2)


@contextmanager
def _watched(model: nn.Module, paths: Any, watch: Watch) -> Iterator[None]:
    """Call `watch` with what each of these modules gives, where that is a tensor."""
    turns: dict[str, int] = defaultdict(int)

    def hook(path: str) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: Any, out: Any) -> Tensor | None:
            turns[path] += 1
            return watch(path, turns[path], out) if is_float(out) else None

        return after

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules() if path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
