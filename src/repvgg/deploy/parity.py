"""Does an engine or a file compute what the model does? Compared with PyTorch in float64, on the model before its fold.

How far off it may be follows from the model: a multiple of the model's own rounding in that precision, measured on this machine.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.guards import copied
from repvgg.fold.reparameterize import reparameterize
from repvgg.fold.rounding import Error, at_least, distance, shake, shaken

# How many times the model's own rounding an engine may be off: engines use Winograd's algorithms, and add in another order.
MULTIPLE = {"fp32": 64, "tf32": 16, "fp16": 16, "bf16": 16, "int16": 16, "int8": 16}
# The unit roundoff of what is multiplied in each precision; of integers, for numbers a fourth as large as the largest.
ROUNDOFF = {"fp32": 2**-24, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-9, "int16": 2**-12, "int8": 2**-6}
DEVIATION_CAP = 0.5  # an error of half the deviation across images would mix up predictions, whatever the precision
CLEAR = 0.1  # of probability: a lead that no right engine loses
TURN = 16  # images at a time in float64


@dataclass(frozen=True)
class Reference:
    """Hold the float64 logits of a model, and how far its own rounding in a precision moves them."""

    logits: Tensor
    own: Error
    precision: str


@dataclass(frozen=True)
class Parity:
    """Tell the error of the logits, the largest that a right engine may make, and how many predictions (a label for
    each image; of masks, for each pixel) are the same as in float64.

    A prediction is clear if its probability in float64 is at least `CLEAR` above that of the next label.
    """

    predictions: int
    error: Error
    bound: Error
    same: int
    clear: int
    differ_where_clear: int

    @property
    def ok(self) -> bool:
        return self.error.within(self.bound)

    def __str__(self) -> str:
        return (
            f"relative error {self.error.relative:.1e} (bound {self.bound.relative:.0e}), {self.error.of_deviation:.1e} of the "
            f"deviation across images, {self.same:,} of {self.predictions:,} predictions the same as PyTorch's in float64"
            + (f" ({self.differ_where_clear} of the others clear)" if self.same < self.predictions else "")
        )


@torch.no_grad()
def reference(model: nn.Module, images: Tensor, precision: str = "fp32") -> Reference:
    """Return what an engine's logits [N, classes] for these images are compared with, of a model in eval mode.

    In fp32 the model's own rounding is that of PyTorch. In lower precisions it is what happens when each weight and input moves by
    the precision's rounding, because PyTorch has not all of them on a CPU.
    """
    model, images = copied(model).cpu(), images.cpu()
    rounded = _logits(model.float(), images.float()) if precision == "fp32" else None
    exact = _logits(model.double(), images.double())
    if rounded is None:
        step = ROUNDOFF[precision]
        rounded = _logits(shake(model, step), shaken(images.double(), step))
    return Reference(exact, at_least(distance([rounded], [exact]), [exact], ROUNDOFF[precision]), precision)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(TURN)])


def compare(got: Tensor, wanted: Reference) -> Parity:
    """Compare an engine's logits; at least two images, for their deviation. Raises `ReparamError` if they differ in shape."""
    exact = wanted.logits
    error = distance([got], [exact])
    if not bool(torch.isfinite(got).all()):
        error = Error(math.inf, math.inf)
    elif not _varies(exact):
        error = Error(error.relative, 0.0)
    limit = wanted.own.times(MULTIPLE[wanted.precision])
    bound = Error(limit.relative, min(limit.of_deviation, DEVIATION_CAP))
    clear = clear_ones(exact)
    same = got.argmax(1) == exact.argmax(1)
    return Parity(same.numel(), error, bound, int(same.sum()), int(clear.sum()), int((clear & ~same).sum()))


def clear_ones(logits: Tensor) -> Tensor:
    """Say of each prediction [N, classes, ...] whether it is clear, as `Parity` has it."""
    best = logits.softmax(1).topk(min(2, logits.shape[1]), dim=1).values
    return best[:, 0] - best[:, -1] >= CLEAR


def _varies(wanted: Tensor) -> bool:
    """Say whether the answer depends on the image at all; one that does not has nothing that an error could mix up."""
    return bool((wanted - wanted[:1]).abs().max() > torch.finfo(wanted.dtype).eps * wanted.abs().max())


def folded(model: nn.Module) -> nn.Module:
    """Return a copy in deploy form. Raises `ReparamError` naming the first thing that cannot be folded."""
    deploy = reparameterize(model)
    left: dict[str, str] = deploy.fold_report.left  # type: ignore[assignment, union-attr]
    if left:
        path, reason = next(iter(left.items()))
        raise ReparamError(f"cannot be folded ({reason})" + (f", and {len(left) - 1} more" if len(left) > 1 else ""), path)
    return deploy
