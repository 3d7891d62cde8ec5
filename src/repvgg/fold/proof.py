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
from repvgg.fold.guards import copied, parts, refuse_train_mode, refuse_uncopyable
from repvgg.fold.rounding import EPSILON, Error, alike, at_least, distance, floats, is_float, shake, shaken, tensors
from repvgg.fold.stepwise import stepwise
from repvgg.numerics import full_float32

Verdict = Literal["equal", "NOT EQUAL", "cannot be judged"]
SHAKES = 2  # perturbations tried in float64
# How many times its own rounding the original may be off. In float64 one perturbation stands for all that is rounded on the way.
MULTIPLE = {torch.float64: 16, torch.float32: 8, torch.float16: 4, torch.bfloat16: 4}
CAP = 0.25  # of the largest output: with a wider bound, different networks would pass for equal
STEPWISE = 1e-9  # a bound in float64 beyond this could hide a wrong fold: such networks are compared step by step
DEVIATION_CAP = 1.0  # of the deviation across images: with a wider bound, the answers to different images would
UNKNOWN = Error(math.inf, math.inf)


@dataclass(frozen=True)
class Verification:
    """Say how well `b` stands for `a`. Errors are against `a` in float64.

    own: what rounding does to `a` itself: in float64, a change of one unit in the last place of input and weights; below, computing
    in `dtype`. `b` may be off by a small multiple of it, `limit`.
    discrete: the outputs are chosen (detections), so that a small error makes them jump, and they did.
    compared: what was compared in their place: the outputs of these children of the models.
    steps: of a network that multiplies rounding, `error` and `own` where after each module both go on from what `a` has computed;
        these decide.
    """

    error: Error
    own: Error
    dtype: torch.dtype
    compared: tuple[str, ...] = ()
    discrete: bool = False
    steps: tuple[Error, Error] | None = None

    @property
    def limit(self) -> Error:
        return self.own.times(MULTIPLE[self.dtype])

    @property
    def max_rel_err(self) -> float:
        return self.error.relative

    @property
    def bound(self) -> float:
        """Return the largest relative error that passes."""
        return self.limit.relative

    @property
    def verdict(self) -> Verdict:
        error, own = self.steps or (self.error, self.own)
        limit = own.times(MULTIPLE[self.dtype])
        if self.discrete or not (limit.relative <= CAP and limit.of_deviation <= DEVIATION_CAP):
            return "cannot be judged"
        return "equal" if error.within(limit) else "NOT EQUAL"

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
            f"{self.own.of_deviation:.1e}){self._steps()}{self._remedy()}"
        )

    def _steps(self) -> str:
        if self.steps is None:
            return ""
        error, own = self.steps
        return f"; step by step, relative error {error.relative:.1e} (own {own.relative:.1e})"

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
    Raises ValueError for fewer than two images.
    """
    if images < 2:
        raise ValueError(f"images is {images}: the deviation across images needs at least 2")
    random = torch.Generator().manual_seed(seed)
    return compare(a, b, (torch.randn(images, *input_size, generator=random, dtype=torch.float64, device="cpu"),))


@torch.no_grad()
def compare(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...]) -> Verification:
    """Compare two models on inputs of one's own (tensors, or trees of them), otherwise as `verify`. On CUDA it turns TF32 off."""
    for model in (a, b):
        refuse_train_mode(model)
    refuse_uncopyable(a)
    like = next(t for t in (*b.parameters(), *b.buffers(), torch.empty(0)) if t.is_floating_point())
    full_float32(like.device)
    inputs = _to(inputs, like)  # rounded first, so that all see the same images
    found = _judge(a, b, inputs, like.dtype)
    assert found is not None
    if found.discrete:
        return _judge(a, b, inputs, like.dtype, instead=True) or found
    if like.dtype == torch.float64 and not found.bound <= STEPWISE:
        return replace(found, steps=stepwise(copied(a).double(), b, inputs, MULTIPLE[like.dtype]))
    return found


def check_part(original: nn.Module, folded: LinearMap) -> float:
    """Return the relative float64 error of a folded module, on noise."""
    x = folded.noise()
    exact = copy.deepcopy(original).double()
    wanted, got = exact(x), folded(x)
    if wanted.shape != got.shape:
        raise ReparamError(
            f"its folded form differs by inf: it gives {list(got.shape)} for {list(wanted.shape)}; please report this"
        )
    error = distance([got], [wanted])
    own = distance([shake(exact, EPSILON)(shaken(x, EPSILON))], [wanted])
    terms = folded.kernel[0].numel()  # a sum's own rounding grows with their root, which moving its terms does not show
    result = Verification(error, at_least(own, [wanted], EPSILON / 2 * math.sqrt(terms)), torch.float64)
    if not error.relative <= result.bound:
        raise ReparamError(f"its folded form differs by {error.relative:.1e} (bound {result.bound:.0e}); please report this")
    return error.relative


# ------------------------------------------------------------------------------------------------------ one comparison


def _judge(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype, instead: bool = False) -> Verification | None:
    """Compare the outputs; or `instead` those of the models' children, as far as they are continuous (None where none are)."""
    exact = copied(a).double()
    wide = torch.utils._pytree.tree_map(_widened, inputs)
    try:
        with _InFloat64():
            wanted = _run(exact, wide, instead)
    except (RuntimeError, TypeError, AssertionError):  # of a kernel that takes the narrow type alone
        wanted = _run(copied(a).double(), wide, instead)
    got = _run(b, inputs, instead)
    if dtype == torch.float64:
        others = [_run(shake(exact, EPSILON, i), shaken(wide, EPSILON, i), instead) for i in range(SHAKES)]
    else:
        others = [_run(copied(a).to(dtype), inputs, instead)]
    if instead:  # not of operators: a convolution that has taken up its batch norm gives something else by right
        wanted = {name: found for name, found in wanted.items() if parts(a.get_submodule(name))}
    found: list[tuple[str, Verification]] = []
    for name in wanted:
        discrete = not all(alike(wanted[name], other.get(name, [])) for other in others)
        if instead and (discrete or not alike(wanted[name], got.get(name, []))):
            continue
        if discrete:
            return Verification(UNKNOWN, UNKNOWN, dtype, discrete=True)
        own = Error.worst([distance(floats(other[name]), floats(wanted[name])) for other in others])
        own = at_least(own, floats(wanted[name]), torch.finfo(dtype).eps / 2)
        error = distance(floats(got[name]), floats(wanted[name]))
        chosen = any(not is_float(t) for t in wanted[name])
        result = Verification(error, own, dtype)
        result = replace(result, discrete=chosen and not instead and not result.ok)
        if not instead or result.verdict != "cannot be judged":
            found.append((name, result))
    if not found:
        return None
    worst = max((result for _, result in found), key=lambda r: (not r.ok, r.error.relative / r.bound))
    return replace(worst, compared=tuple(name for name, _ in found) if instead else ())


def _run(model: nn.Module, inputs: tuple[Any, ...], children: bool) -> dict[str, list[Tensor]]:
    """Return the tensors that a model returns, under ""; or those that each of its children does, under the children's names."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(name, []).extend(t.clone() for t in tensors(out))

    handles = [child.register_forward_hook(hook(name)) for name, child in model.named_children()] if children else []
    try:
        out = model(*copy.deepcopy(inputs))  # a forward may work in place
    finally:
        for handle in handles:
            handle.remove()
    return {name: kept for name, kept in seen.items() if floats(kept)} if children else {"": tensors(out)}


class _InFloat64(torch.overrides.TorchFunctionMode):
    """Goes on in float64 after whatever a forward casts to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.utils._pytree.tree_map(_widened, func(*args, **(kwargs or {})))


def _widened(value: Any) -> Any:
    """Return a tensor of floating point in float64, on its own device, and anything else as it is."""
    return value.double() if is_float(value) and value.dtype != torch.float64 else value


def _to(inputs: Any, like: Tensor) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.to(like) if is_float(v) else v, inputs)
