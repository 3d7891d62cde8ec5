"""Runs of several processes: as torchrun starts them; and two that are told what it tells its own, with PyTorch loaded already."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from forks import Ended, Forks, Started

from repvgg.models.load import load

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RAY_worker_niceness": "0"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
NETWORK = "train --no-report --arch repvgg_micro --width 0.25 --data digits --limit 127 --device cpu"
HOW = "--recipe demo --epochs 3 --batch-size 16 --mixup 0.2 --ema 0.9 --warmup-epochs 0 --save-steps 2"
WORDS = [*f"{NETWORK} {HOW}".split(), "--out"]
COMMAND = ["-m", "repvgg", *WORDS]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def torchrun(*words: str, restarts: int = 0) -> list[str]:
    where = f"--nproc-per-node 2 --max-restarts {restarts} --master-addr 127.0.0.1 --master-port {free_port()}"
    return [*TORCHRUN, *where.split(), *words]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": t for name in ("best", "last") for key, t in load(out / f"{name}.safetensors").state_dict().items()}


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells the process `rank` of two."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start_both(forks: Forks, what: list[str] | str, folder: Path, stack: ExitStack) -> list[Started]:
    """Start a command, or a program, twice; they end with the stack."""
    port = free_port()
    return [stack.enter_context(forks.start(what, folder, environment(rank, port))) for rank in range(2)]


def both(forks: Forks, what: list[str] | str, folder: Path) -> list[Ended]:
    with ExitStack() as stack:
        return [process.wait() for process in start_both(forks, what, folder, stack)]
