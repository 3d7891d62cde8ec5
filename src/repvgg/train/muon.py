"""Muon: steps that turn every direction of a kernel by as much, so that few directions do not take all of the learning.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); Jordan, "94% on CIFAR-10 in 3.29 seconds
on a single GPU" (2024) and its later code, where kernels keep their size as here. PyTorch's own takes matrices alone, timm's moves
all else by AdamW.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.fold.as_linear import CONVOLUTIONS, Branches

ITERATIONS = 3  # are enough for convolutions (Jordan 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that brings singular values from (0, 1] near 1 in fewest iterations


class Muon(torch.optim.SGD):
    """SGD, but in groups with `turned`, of kernels [out, in, kh, kw], where a step is an angle in radians.

    There the momentum, as a matrix [out, in x kh x kw], gives way to the nearest one whose singular values are all about 1, and
    kernels keep their norm: it says nothing where a batch norm follows, and weight decay would be without effect.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype | None = None, **how: Any) -> None:
        """Take groups of parameters. dtype: of the matrices' products, None for the kernels' own; how: as of SGD."""
        super().__init__(groups, **how)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Take one step by the gradients of the parameters. closure: as of every optimizer."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["turned"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["turned"]:
                for kernel in group["params"]:
                    if kernel.grad is not None:
                        self._turn(kernel, kernel.grad, group)
        return loss

    def _turn(self, kernel: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[kernel]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(kernel)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        ahead = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        step = orthogonal(ahead.flatten(1).to(self.dtype or kernel.dtype)).to(kernel.dtype).view(kernel.shape)
        size = kernel.norm()
        kernel.sub_(step * (group["lr"] * size / step.norm().clamp(min=1e-12)))
        kernel.mul_(size / kernel.norm().clamp(min=1e-12))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix whose singular values are all 1: these are from 0.5 to 1.3, but for those near 0 at first."""
    wide: Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp(min=1e-12)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = x @ x.T
        x = torch.addmm(x, torch.addmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def turned_kernels(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the kernels that Muon is for: of convolutions that are not grouped, and whose size a batch norm takes away.

    Where branches are added up before the batch norm, their sizes matter; those of kernels that are derived from others do too.
    """
    for parent in model.modules():
        if not isinstance(parent, Branches):
            for module, following in pairwise(parent.children()):
                norm = isinstance(following, nn.modules.batchnorm._BatchNorm)
                if norm and type(module) in CONVOLUTIONS and module.bias is None and module.groups == 1:
                    yield module.weight
