"""Does an engine or a file compute what the model does? Compared with PyTorch in float64, on the model before its fold."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repvgg.fold.algebra import ReparamError
from repvgg.fold.proof import Error, distance
from repvgg.fold.reparameterize import reparameterize

# Relative error of the logits that is allowed, by the precision of an engine.
BOUND = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1}
DEVIATION_FACTOR = 100  # the same error against the deviation of the outputs across images, which a constant output cannot hide in
TURN = 16  # images at a time in float64


@dataclass(frozen=True)
class Parity:
    """The error of the logits, the bound of the relative one, and how many predictions (a label for each image; of masks, for each
    pixel) are the same as in float64.

    A prediction is clear if its two best logits in float64 are farther apart than twice the largest error.
    """

    predictions: int
    error: Error
    bound: float
    same: int
    clear: int
    differ_where_clear: int

    @property
    def ok(self) -> bool:
        """An error of half the deviation across images would mix up predictions, whatever the precision."""
        return self.error.relative <= self.bound and self.error.of_deviation <= min(DEVIATION_FACTOR * self.bound, 0.5)

    def __str__(self) -> str:
        return (
            f"relative error {self.error.relative:.1e} (bound {self.bound:.0e}), {self.error.of_deviation:.1e} of the deviation "
            f"across images, {self.same:,} of {self.predictions:,} predictions the same as PyTorch's in float64"
            + (f" ({self.differ_where_clear} of the others clear)" if self.same < self.predictions else "")
        )


@torch.no_grad()
def reference(model: nn.Module, images: Tensor) -> Tensor:
    """float64 logits [N, classes] of a model in eval mode."""
    exact = copy.deepcopy(model).cpu().double()
    return torch.cat([exact(part.double()) for part in images.cpu().split(TURN)])


def compare(got: Tensor, wanted: Tensor, precision: str = "fp32") -> Parity:
    """Logits of an engine with those of `reference`; at least two images, for their deviation. Raises `ReparamError` if they differ
    in shape."""
    error = distance([got], [wanted])
    if not bool(torch.isfinite(got).all()):
        error = Error(math.inf, math.inf)
    best = wanted.topk(min(2, wanted.shape[1]), dim=1).values
    clear = best[:, 0] - best[:, -1] > 2 * (got - wanted).abs().max()
    same = got.argmax(1) == wanted.argmax(1)
    return Parity(same.numel(), error, BOUND[precision], int(same.sum()), int(clear.sum()), int((clear & ~same).sum()))


def folded(model: nn.Module) -> nn.Module:
    """A copy in deploy form. Raises `ReparamError` naming the first thing that cannot be folded."""
    deploy = reparameterize(model)
    left: dict[str, str] = deploy.fold_report.left  # type: ignore[assignment, union-attr]
    if left:
        path, reason = next(iter(left.items()))
        raise ReparamError(f"cannot be folded ({reason})" + (f", and {len(left) - 1} more" if len(left) > 1 else ""), path)
    return deploy
