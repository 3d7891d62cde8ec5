"""Two processes that do the same and are told what torchrun tells its own; but PyTorch is loaded in them already."""

import socket
from contextlib import ExitStack
from pathlib import Path

from forks import Ended, Forks, Started


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


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
