"""Prove that a fold computes the same: each part alone, and the whole model, against the original in float64.

How far off a right fold may be depends on the network, so it is measured, on the machine at hand. In float64: how far the output
moves when the input and the weights change by one unit in the last place. In float32 and below: how far the original itself is
off from its float64 result. A small multiple of that is the bound. Where the bound is too large to tell a right fold from a wrong
one, the verdict says so.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import LinearMap, ReparamError
from repvgg.fold.guards import copied, refuse_train_mode, refuse_uncopyable

Verdict = Literal["equal", "NOT EQUAL", "cannot be judged"]
EPSILON = torch.finfo(torch.float64).eps
SHAKES = 2  # perturbations tried in float64
# How many times its own rounding the original may be off. In float64 one perturbation stands for all that is rounded on the way.
MULTIPLE = {torch.float64: 100, torch.float32: 8, torch.float16: 4, torch.bfloat16: 4}
CAP = 0.25  # of the largest output: with a wider bound, different networks would pass for equal
DEVIATION_CAP = 1.0  # of the deviation across images: with a wider bound, the answers to different images would


@dataclass(frozen=True)
class Error:
    """Distance of outputs from a reference: the largest, relative to the largest output; and relative to the outputs' mean standard
    deviation across images, because a net whose outputs hardly depend on its input looks perfect by the first."""

    relative: float
    of_deviation: float

    def times(self, factor: float) -> "Error":
        return Error(factor * self.relative, factor * self.of_deviation)

    def within(self, bound: "Error") -> bool:
        """Whether both are finite and at most the bound's."""
        return (
            math.isfinite(self.relative)
            and self.relative <= bound.relative
            and not self.of_deviation > bound.of_deviation
            and not math.isnan(self.of_deviation)
        )

    @staticmethod
    def worst(errors: "list[Error]") -> "Error":
        return Error(max(e.relative for e in errors), max(e.of_deviation for e in errors))


UNKNOWN = Error(math.inf, math.inf)


@dataclass(frozen=True)
class Verification:
    """How well `b` stands for `a`. Errors are against `a` in float64.

    own: what rounding does to `a` itself: in float64, a change of one unit in the last place of input and weights; below, computing
    in `dtype`. `b` may be off by a small multiple of it, `limit`.
    discrete: the outputs are chosen (detections), so that a small error makes them jump, and they did.
    compared: what was compared in their place: the outputs of these children of the models.
    """

    error: Error
    own: Error
    dtype: torch.dtype
    compared: tuple[str, ...] = ()
    discrete: bool = False

    @property
    def limit(self) -> Error:
        return self.own.times(MULTIPLE[self.dtype])

    @property
    def max_rel_err(self) -> float:
        return self.error.relative

    @property
    def bound(self) -> float:
        """The largest relative error that passes."""
        return self.limit.relative

    @property
    def verdict(self) -> Verdict:
        if self.discrete or not (self.limit.relative <= CAP and self.limit.of_deviation <= DEVIATION_CAP):
            return "cannot be judged"
        return "equal" if self.error.within(self.limit) else "NOT EQUAL"

    @property
    def ok(self) -> bool:
        return self.verdict == "equal"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        where = f" (outputs are discrete: {', '.join(self.compared)} compared instead)" if self.compared else ""
        what = "one unit in the last place moves the output by" if self.dtype == torch.float64 else "the original's own rounding"
        return (
            f"{self.verdict} in {name}{where}: relative error {self.error.relative:.1e} (bound {self.bound:.0e}; {what} "
            f"{self.own.relative:.1e}), {self.error.of_deviation:.1e} of the deviation across images (own "
            f"{self.own.of_deviation:.1e}){self._remedy()}"
        )

    def _remedy(self) -> str:
        if self.verdict != "cannot be judged":
            return ""
        if self.discrete:
            return "; outputs are discrete, and small errors make them jump: compare the tensors that they are chosen from"
        if self.dtype != torch.float64:
            return "; compare both in float64 (.double())"
        return "; the network multiplies its own rounding: compare its parts"


@torch.no_grad()
def verify(a: nn.Module, b: nn.Module, input_size: tuple[int, int, int], images: int = 4, seed: int = 0) -> Verification:
    """Compare two models on random images [images, *input_size]: `b` in its own precision against `a` in float64.

    Both must be in eval mode (`ReparamError` otherwise) and on one device. Outputs may be tensors or trees of tensors.
    """
    if images < 2:
        raise ValueError(f"images is {images}: the deviation across images needs at least 2")
    return compare(a, b, (torch.randn(images, *input_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),))


@torch.no_grad()
def compare(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...]) -> Verification:
    """Compare two models on inputs of one's own (tensors, or trees of them), otherwise as `verify`."""
    for model in (a, b):
        refuse_train_mode(model)
    refuse_uncopyable(a)
    like = next(t for t in (*b.parameters(), *b.buffers(), torch.empty(0)) if t.is_floating_point())
    inputs = _to(inputs, like)  # rounded first, so that all see the same images
    found = _judge(a, b, inputs, like.dtype)
    assert found is not None
    return _judge(a, b, inputs, like.dtype, instead=True) or found if found.discrete else found


def distance(got: list[Tensor], wanted: list[Tensor]) -> Error:
    """Return how far outputs are from a reference. Raises `ReparamError` where they differ in number or shape."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        raise ReparamError("the two models' outputs differ in number or shape")
    if not wanted:
        raise ReparamError("the models return no tensors of floating point to compare")
    off = [_largest(g.double() - w) for g, w in zip(got, wanted, strict=True)]
    return Error(max(map(_ratio, off, map(_largest, wanted))), max(map(_ratio, off, map(_deviation, wanted))))


def check_part(original: nn.Module, folded: LinearMap) -> float:
    """Relative float64 error of a module in eval mode, on noise just large enough for every tap, border and a second step."""
    geometry = zip(folded.kernel_size, folded.dilation, folded.stride, folded.padding, strict=True)
    size = [d * (k - 1) + 1 + 2 * s + p for k, d, s, p in geometry]
    noise = torch.Generator().manual_seed(folded.in_channels * 31 + folded.kernel_size[0])
    x = torch.randn(2, folded.in_channels, *size, generator=noise, dtype=torch.float64).to(folded.kernel.device)
    exact = copy.deepcopy(original).double()
    wanted, got = exact(x), folded(x)
    if wanted.shape != got.shape:
        raise ReparamError(
            f"its folded form differs by inf: it gives {list(got.shape)} for {list(wanted.shape)}; please report this"
        )
    error = distance([got], [wanted])
    own = distance([shake(exact, EPSILON)(shaken(x, EPSILON))], [wanted])
    result = Verification(error, at_least(own, [wanted], EPSILON / 2), torch.float64)
    if not error.relative <= result.bound:
        raise ReparamError(f"its folded form differs by {error.relative:.1e} (bound {result.bound:.0e}); please report this")
    return error.relative


# ------------------------------------------------------------------------------------------------------ one comparison


def _judge(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype, instead: bool = False) -> Verification | None:
    """Compare the outputs; or `instead` those of the models' children, as far as they are continuous (None where none are)."""
    exact = copied(a).double()
    wide = _to(inputs, torch.empty(0, dtype=torch.float64))
    wanted, got = _run(exact, wide, instead), _run(b, inputs, instead)
    if dtype == torch.float64:
        others = [_run(shake(exact, EPSILON, i), shaken(wide, EPSILON, i), instead) for i in range(SHAKES)]
    else:
        others = [_run(copied(a).to(dtype), inputs, instead)]
    found: list[tuple[str, Verification]] = []
    for name in wanted:
        discrete = not all(_alike(wanted[name], other.get(name, [])) for other in others)
        if instead and (discrete or not _alike(wanted[name], got.get(name, []))):
            continue
        if discrete:
            return Verification(UNKNOWN, UNKNOWN, dtype, discrete=True)
        own = Error.worst([distance(_floats(other[name]), _floats(wanted[name])) for other in others])
        own = at_least(own, _floats(wanted[name]), torch.finfo(dtype).eps / 2)
        error = distance(_floats(got[name]), _floats(wanted[name]))
        chosen = any(not _is_float(t) for t in wanted[name])
        result = Verification(error, own, dtype)
        result = replace(result, discrete=chosen and not instead and not result.ok)
        if not instead or result.verdict != "cannot be judged":
            found.append((name, result))
    if not found:
        return None
    worst = max((result for _, result in found), key=lambda r: (not r.ok, r.error.relative / r.bound))
    return replace(worst, compared=tuple(name for name, _ in found) if instead else ())


def _run(model: nn.Module, inputs: tuple[Any, ...], children: bool) -> dict[str, list[Tensor]]:
    """The tensors that a model returns, under ""; or those that each of its children does, under the children's names."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(name, []).extend(t.clone() for t in _tensors(out))

    handles = [child.register_forward_hook(hook(name)) for name, child in model.named_children()] if children else []
    try:
        out = model(*copy.deepcopy(inputs))  # a forward may work in place
    finally:
        for handle in handles:
            handle.remove()
    return {name: kept for name, kept in seen.items() if _floats(kept)} if children else {"": _tensors(out)}


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
        if not _is_float(t):
            return t
        up = torch.randint(0, 2, t.shape, generator=random, dtype=torch.int8).to(t.device)
        return t * (1 + step * (2 * up - 1).to(t.dtype))

    return torch.utils._pytree.tree_map(moved, value)


def at_least(own: Error, wanted: list[Tensor], roundoff: float) -> Error:
    """No result is nearer than one rounding of its largest number."""
    spread = max((_ratio(_largest(w), _deviation(w)) for w in wanted), default=0.0)
    return Error(max(own.relative, roundoff), max(own.of_deviation, roundoff * spread))


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return [t.shape for t in some] == [t.shape for t in others]


def _to(inputs: Any, like: Tensor) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.to(like) if _is_float(v) else v, inputs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if _is_float(t)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _deviation(t: Tensor) -> float:
    """The mean standard deviation across images; of one image alone, its largest number."""
    return float(t.double().std(dim=0).mean()) if t.dim() and len(t) > 1 else _largest(t)


def _ratio(error: float, size: float) -> float:
    if error != error:
        return float("inf")
    return error / size if size else (0.0 if error == 0 else float("inf"))
