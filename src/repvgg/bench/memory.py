"""Memory: batches that fit, what a process holds, and the two stacks of Figure 3.

    python -m repvgg.bench.memory residual 64 512        # growth of resident memory, in bytes, of a fresh process

Figure 3 of the paper: a residual block keeps its input for the shortcut, so two feature maps at its peak; a plain layer keeps one.
"""

import contextlib
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.disk import Log, out_of_memory

Made = TypeVar("Made")
STACKS = ("residual", "plain")
CONVOLUTIONS = 4  # in a stack


def fitting(make: Callable[[int], Made], batch_size: int, name: str, log: Log) -> Made:
    """Return `make(batch_size)`, with half the batch as often as memory runs out, and a word each time.

    Raises what `make` raises, when it is something else or one image is too much.
    """
    while True:
        gc.collect()
        try:
            return make(batch_size)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        batch_size //= 2
        log(f"{name}: out of memory, trying batch {batch_size}")


def held(device: str) -> int:
    """Return the bytes held now: by CUDA's allocator, whose peak is counted from here on, or by the process."""
    if torch.device(device).type == "cuda":
        torch.cuda.init()  # "cuda:1" is refused before
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for later would hide what comes: glibc gives it back here
    return _resident()


def peak(device: str) -> int:
    """Return the bytes of CUDA's allocator at its peak since `held`; on the CPU those held now, which engines do not give back."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _resident()


def _resident() -> int:
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (batch norms folded)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


def stack(kind: str, channels: int) -> nn.Sequential:
    """Return a "residual" or "plain" stack of four 3x3 convolutions, in eval mode: [N, 1, H, W] -> [N, channels, H, W].

    A convolution of one channel to `channels` comes before it, so that what the caller holds on to hardly counts.
    """
    stem = nn.Conv2d(1, channels, 3, padding=1)
    if kind == "residual":
        layers: list[nn.Module] = [ResidualBlock(channels) for _ in range(CONVOLUTIONS // 2)]
    elif kind == "plain":
        layers = [layer for _ in range(CONVOLUTIONS) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
    else:
        raise ValueError(f"no stack {kind!r}: there are {', '.join(STACKS)}")
    return nn.Sequential(stem, *layers).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def resident_growth(kind: str, channels: int, size: int) -> int | None:
    """Return by how many bytes a fresh process grows at its peak while a stack runs on one image; None but on Linux."""
    if not PROCESS.exists():
        return None
    command = [sys.executable, "-m", "repvgg.bench.memory", kind, str(channels), str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


PROCESS = Path("/proc/self")


@torch.inference_mode()
def _grow(kind: str, channels: int, size: int) -> int:
    model, image = stack(kind, channels), torch.randn(1, 1, size, size)
    model(image[..., :32, :32])  # libraries take their lasting memory in the first run
    (PROCESS / "clear_refs").write_text("5")  # the peak is counted from here on
    before = _resident()
    model(image)
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


if __name__ == "__main__":
    print(_grow(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
