"""Many processes that train one model: torch.distributed under torchrun, NCCL on GPUs and gloo elsewhere.

torchrun --nproc-per-node 2 -m repvgg train ...

with joined("cpu") as world:                    # alone, where torchrun has not started this process
    world.rank, world.size, world.main
    world.total(tensor)                         # the sum over all processes
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from repvgg.data import DataError
from repvgg.disk import in_a_line
from repvgg.train.guard import Guard

MEETING = timedelta(seconds=50)  # from the first process that is here to the last
TIMEOUT = timedelta(minutes=30)  # for the slowest of what one process does while the others wait: evaluation, and writing files


LOST = "another process is gone; all saved files are intact"


class LostError(ConnectionError):
    """Another process is gone. torchrun starts all of them again, and they go on from the state saved last."""


@dataclass(frozen=True)
class World:
    """This process among all that train the model; they exchange tensors on `device`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    control: Any = None
    """A group of the same processes that works in main memory; None where the main one does."""

    @property
    def main(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def copy_buffers(self, module: nn.Module) -> None:
        """Copy the first process's buffers to all: each has seen other images, so batch norms' statistics differ."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, number: int) -> int:
        """Return the largest of all processes' numbers, without waiting for a GPU."""
        if self.size == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def told(self, text: str) -> str:
        """Return the first process's text."""
        if self.size == 1:
            return text
        length = torch.tensor([len(text.encode())], device=self.device)
        dist.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.main:
            content.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)) if text else None
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def given(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, on the CPU; the others give one of its shape and dtype."""
        if self.size == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        dist.broadcast(sent, 0)
        return sent.cpu()

    def shared(self, facts: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Return the first process's facts, which JSON can tell, and its tensors, on the CPU; what the others give is left out."""
        if self.size == 1:
            return facts, tensors
        shapes = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
        facts, shapes = json.loads(self.told(json.dumps([facts, shapes])))
        mine = tensors if self.main else {name: torch.empty(s, dtype=getattr(torch, dtype)) for name, (dtype, s) in shapes.items()}
        return facts, {name: self.given(tensor) for name, tensor in mine.items()}

    def once(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the arrays that the first process makes. Raises `DataError` in all where it does in the first."""
        if self.size == 1:
            return make()
        reason, arrays = "", dict[str, Any]()
        if self.main:
            try:
                arrays = make()
            except DataError as error:
                reason = str(error)
        reason, tensors = self.shared(reason, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
        if reason:
            raise DataError(reason)
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def wait(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def local_device(device: str) -> str:
    """Return the GPU of this process, where torchrun started several on this machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Meet the processes that torchrun started beside this one, and part in the end; or join those of a group that is there.

    Raises ValueError where they cannot meet, and `LostError` when one of them is lost. This process ends, with a line, where they
    do not meet within `MEETING`, when its agent is gone, and when it is asked to stop and others keep it waiting.
    """
    if dist.is_initialized():  # by Ray Train, say
        yield _world(device)
        return
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    with Guard(f"repvgg (process {rank})") as guard:
        guard.limit(MEETING.total_seconds(), f"has not met the other processes within {MEETING.seconds} seconds")
        _meet(rank, size, "nccl" if torch.device(device).type == "cuda" else "gloo")
        guard.free()
        try:
            yield _world(device)
        except dist.DistError as error:
            raise LostError(LOST) from error
        except RuntimeError as error:
            if any(word in str(error) for word in ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo")):
                raise LostError(LOST) from error
            raise
        finally:
            dist.destroy_process_group()


def _world(device: str) -> World:
    """Return this process's place in the group; where that works on GPUs, with another one of the same that does not."""
    on_gpu = torch.device(device).type == "cuda"
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else None
    return World(dist.get_rank(), dist.get_world_size(), device, control)


def _meet(rank: int, size: int, backend: str) -> None:
    """Make the process group. Raises ValueError with the remedy where that cannot be done."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        meeting = _meeting(store, rank, size)
        dist.init_process_group(backend, store=PrefixStore(meeting, store), rank=rank, world_size=size, timeout=TIMEOUT)
    except (dist.DistError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = in_a_line(error)
        raise ValueError(f"cannot meet the other processes at {where} ({reason}): give torchrun another --master-port") from None


def _meeting(store: Store, rank: int, size: int) -> str:
    """Agree on a name under which these very processes exchange addresses.

    The agent's store outlives an attempt, and with it the addresses of dead processes; how many attempts there were, machines do
    not agree on. So each process says that it is here under a name of its own, and all wait until all have seen the same names.
    """
    store.set(f"here/{rank}", uuid.uuid4().hex)
    while True:
        names = store.multi_get([f"here/{other}" for other in range(size)])
        meeting = hashlib.sha256(b"".join(names)).hexdigest()
        store.set(f"{meeting}/{rank}", "seen")
        if store.check([f"{meeting}/{other}" for other in range(size)]):
            return meeting
        time.sleep(0.02)
