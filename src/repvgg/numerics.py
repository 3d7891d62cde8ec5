"""Switches of PyTorch that decide what float32 means on a GPU, and whether a run can be repeated there."""

import os

import torch


def full_float32(device: str | torch.device) -> None:
    """Make products on a CUDA device those of float32: cuDNN rounds factors to 10 bits (TF32) unless it is told not to.

    The switches are global, and the engines set them for themselves, so call this before each use.
    """
    if torch.device(device).type == "cuda":  # the older names: see deploy/engines/eager.py
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def repeatable(device: str | torch.device) -> None:
    """Make a CUDA device take algorithms that give the same bits each time, wherever PyTorch has one.

    The upsampling of masks has none: PyTorch warns, and such a run can differ in its last bits.
    """
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.benchmark = False  # which algorithm is fastest differs from run to run
        torch.use_deterministic_algorithms(True, warn_only=True)
