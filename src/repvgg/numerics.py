"""Switches of PyTorch that decide what float32 means on a GPU, and whether a run can be repeated there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def full_float32(device: str | torch.device) -> None:
    """Make products on a CUDA device those of float32: cuDNN rounds factors to 10 bits (TF32) unless it is told not to.

    The switches are global, and the engines set them for themselves, so call this before each use.
    """
    if torch.device(device).type == "cuda":  # the older names: see deploy/engines/eager.py
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@contextmanager
def repeatable(device: str | torch.device) -> Iterator[None]:
    """Make a CUDA device take algorithms that give the same bits each time, wherever PyTorch has one, in the `with` block.

    It has none for the loss over masks (nll_loss2d) and the backward passes of PSPNet's pooling (adaptive_avg_pool2d) and, in some
    versions, of the upsampling: PyTorch warns, and such a run can differ in its last bits. The switches are global: what is timed
    after the block has the algorithms that it had before.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    cudnn, deterministic = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    filled: Any = torch.utils.deterministic  # its switch is a property of the module
    before = cudnn.benchmark, torch.is_deterministic_algorithms_warn_only_enabled(), filled.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    cudnn.benchmark = False  # which algorithm is fastest differs from run to run
    filled.fill_uninitialized_memory = False  # nothing here reads memory that it has not written: it would only cost time
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        cudnn.benchmark, filled.fill_uninitialized_memory = before[0], before[2]
        torch.use_deterministic_algorithms(deterministic, warn_only=before[1])
