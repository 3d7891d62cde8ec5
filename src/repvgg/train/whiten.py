"""The first layer as a whitening of the images' patches, by which small images are said to be learnt in fewer epochs.

Sources: Page, "How to train your ResNet 8: bag of tricks" (2019); Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024).
There these kernels are frozen; here they are a start, as the other branches' kernels are.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = 2_000  # are enough for the 27 x 27 covariances of 3x3 patches
POSITIONS = 32  # of patches along a side, about
SMALLEST = 5e-4  # added to each variance: a direction in which patches hardly differ is not blown up without end


@torch.no_grad()
def whiten(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Set the first layer's kernels so that what they find in the images is uncorrelated, and of one size.

    images: batches [N, C, H, W], normalised; the first 2,000 images are looked at. The kernels are the directions in which patches
    differ most, each divided by its standard deviation, and their negatives, for ReLU keeps one side of each. Kernels beyond
    twice the patch's C x kh x kw numbers stay as they are. Raises ValueError for a network whose first layer has no such kernels.
    """
    conv = _first(model)
    directions = _whitening(_covariance(images, conv))[: conv.out_channels // 2]
    kernels = torch.cat([directions, -directions]).view(-1, *conv.weight.shape[1:])
    conv.weight[: len(kernels)] = kernels.to(conv.weight)


def _first(model: nn.Module) -> nn.Conv2d:
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == 1 and max(module.kernel_size) > 1:
            return module
    raise ValueError(f"--whiten: {type(model).__name__} has no convolution whose kernels could be set: say --no-whiten")


def _covariance(images: Iterable[Tensor], conv: nn.Conv2d) -> Tensor:
    """Return the second moments of the images' patches, [P, P] for P = C x kh x kw, in float64."""
    found, seen, patches = torch.zeros(conv.weight[0].numel(), conv.weight[0].numel(), dtype=torch.float64), 0, 0
    for x in images:
        stride = max(1, min(x.shape[2:]) // POSITIONS)
        columns = F.unfold(x.float().cpu(), conv.kernel_size, stride=stride).transpose(0, 1).flatten(1)  # type: ignore[arg-type]
        found += (columns @ columns.T).double()
        seen, patches = seen + len(x), patches + columns.shape[1]
        if seen >= IMAGES:
            break
    return found / max(1, patches)


def _whitening(covariance: Tensor) -> Tensor:
    """Return the eigenvectors, each divided by the root of its eigenvalue, the largest first: [P, P]."""
    variances, directions = torch.linalg.eigh(covariance)
    found: Tensor = (directions / (variances + SMALLEST).sqrt()).T.flip(0)
    return found
