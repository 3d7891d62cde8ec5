"""Many processes that train one model: torch.distributed under torchrun, NCCL on GPUs and gloo elsewhere.

torchrun --nproc-per-node 2 -m repvgg train ...

with joined("cpu") as world:                    # alone, where torchrun has not started this process
    world.rank, world.size, world.main
    world.total(tensor)                         # the sum over all processes
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=30)  # for the slowest of what one process does while the others wait: evaluation, and writing files


class LostError(ConnectionError):
    """Another process is gone. torchrun starts all of them again, and they go on from the state saved last."""


@dataclass(frozen=True)
class World:
    """This process among all that train the model; they exchange tensors on `device`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def copy_buffers(self, module: nn.Module) -> None:
        """The first process's buffers to all: each has seen other images, so batch norms' statistics differ."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def local_device(device: str) -> str:
    """The GPU of this process, where torchrun started several on this machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Meet the processes that torchrun started beside this one, and part in the end.

    Raises ValueError where they cannot meet, and `LostError` when one of them is lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    except (dist.DistError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"cannot meet the other processes at {where} ({reason}): give torchrun another --master-port") from None
    try:
        yield World(dist.get_rank(), size, device)
    except dist.DistError as error:
        raise _lost(error) from None
    except RuntimeError as error:
        if any(word in str(error) for word in ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo")):
            raise _lost(error) from None
        raise
    finally:
        dist.destroy_process_group()


def _lost(error: BaseException) -> LostError:
    return LostError(f"another process is gone ({(str(error).splitlines() or [''])[0][-120:].strip()})")
