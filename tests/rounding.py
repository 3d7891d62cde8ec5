"""How far apart two right computations of the same thing may be, measured on the machine that runs the test.

A bound that held on one processor is no bound (DESIGN, trap 17): other vector widths add in another order. So each test asks how
much of its result is rounding, here and now, and allows a small multiple of that:

- in float32 and below, the original's own distance from the same computation in float64;
- in float64, where there is nothing better to compare with, what the result moves by when every number that goes in (images,
  weights, statistics) moves by one unit in its last place, up or down at random.

A badly conditioned network is so judged by its own condition, and a well conditioned one strictly: one kernel element that is off
by a thousandth is far outside in both (test_rounding.py).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from conftest import relative_error
from torch import Tensor, nn

TIMES = 10.0  # the most that was seen is 3: another order of summation, and a kernel that is rounded once more
ENGINES = 32.0  # for another engine, which may use Winograd transforms: the most that was seen is 9
REPORTED = 1e-3  # an error that a command reports is rounding, whatever that is here: far below this, and a wrong network's above

Function = Callable[..., Tensor]


def rounding(
    function: Function, *inputs: Tensor, times: float = TIMES, error: Callable[[Tensor, Tensor], float] = relative_error
) -> float:
    """Return the largest relative error that a right computation of `function(*inputs)` may have on this machine.

    `function` is a module or any function of tensors, in the dtype of the first input. `times`: how many times
    what was measured. `error`: how the distance is measured, `relative_error` or `error_of_deviation`.
    """
    with torch.no_grad():
        if inputs[0].dtype == torch.float64:
            wanted = function(*inputs)
            own = error(_nudged(function)(*map(_nudge, inputs)), wanted)
        else:
            own = error(function(*inputs), in_float64(function)(*(x.double() for x in inputs)))
    return times * max(own, torch.finfo(inputs[0].dtype).eps)


def in_float64(function: Function) -> Function:
    """Return a copy of a module in float64; a function without weights as it is."""
    return copy.deepcopy(function).double() if isinstance(function, nn.Module) else function


def _nudge(tensor: Tensor) -> Tensor:
    """Return the tensor with each element one unit in the last place larger or smaller."""
    up = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    infinity = torch.full_like(tensor, torch.inf)
    return torch.nextafter(tensor, torch.where(up, infinity, -infinity))


def _nudged(function: Function) -> Function:
    if not isinstance(function, nn.Module):
        return function
    other: Any = copy.deepcopy(function)
    for tensor in [*other.parameters(), *other.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(_nudge(tensor.detach()))
    return other  # type: ignore[no-any-return]
