"""The state that a run needs to go on, bit for bit: state/STEP.safetensors in its folder, the last two of them.

store = Store(Path("runs/a0/state"))
store.save_soon(State(500, {"model.stem...": tensor}, {"seconds": 61.0}))
store.wait()                              # until it is on the disk
state = store.latest()                    # the last one that is whole; None if there is none

Each holds a SHA-256 of all that is in it, and is renamed into place once it is on the disk.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repvgg.disk import FileError, Log, atomically, in_a_line
from repvgg.train.distributed import World
from repvgg.train.mirror import STATE, Mirror

FORMAT = 1
KEEP = 2


@dataclass(frozen=True)
class State:
    """All that a run needs to go on. step: of the optimizer, since the start of the run. facts: what is not a tensor, as JSON."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Store:
    """The states of one run, and the copy of the run that is brought up to date with each."""

    def __init__(self, folder: Path, log: Log = print, mirror: Mirror | None = None) -> None:
        self.folder, self.log, self.mirror = folder, log, mirror or Mirror("", folder)
        self.writer = ThreadPoolExecutor(1, "repvgg state")
        self.writing: Future[None] | None = None

    def save_soon(self, state: State) -> None:
        """Copy the state, and write it whole while the caller goes on; then let go of all but the last two.

        Raises the error of the one before, as `wait` does.
        """
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.tensors.items()}
        self.writing = self.writer.submit(self._save, State(state.step, copies, state.facts))

    def wait(self) -> None:
        """Wait until what was given to `save_soon` is on the disk.

        Raises `FileError` if it cannot be, such as on a full disk; those before are intact.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _save(self, state: State) -> None:
        tensors = state.tensors
        facts = json.dumps({"format": FORMAT, "step": state.step, **state.facts})
        metadata = {"facts": facts, "sha256": _digest(tensors, facts)}
        atomically(self.folder / f"{state.step:09d}.safetensors", lambda path: _write(tensors, path, metadata))
        for old in self._files()[KEEP:]:
            old.unlink(missing_ok=True)
        self.mirror.send()

    def latest(self) -> State | None:
        """Return the last state that is whole, with a word on those that are not.

        Raises `FileError` if all are damaged, or of another version of this program.
        """
        self.mirror.fetch()
        files = self._files()
        for path in files:
            try:
                return _read(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, FileError):
                    raise
                self.log(f"{path}: damaged, it is left out ({in_a_line(error)})")
        if files:
            raise FileError(f"{self.folder}: every state in it is damaged; --resume never starts over")
        return None

    def clear(self) -> None:
        """Forget all."""
        for path in self._files():
            path.unlink()

    def ours(self) -> bool:
        """Return whether the folder is one of states, or is still empty."""
        names = [path.name for path in self.folder.glob("[!.]*")]
        return self.folder.is_dir() and (not names or any(map(STATE.fullmatch, names)))

    def _files(self) -> list[Path]:
        """The latest first."""
        return sorted((path for path in self.folder.glob("*") if STATE.fullmatch(path.name)), reverse=True)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it wraps the system's own errors in words
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise OSError(0, "no space left on the disk" if full else str(error)) from None


def _read(path: Path) -> State:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    facts = metadata["facts"]
    if _digest(tensors, facts) != metadata["sha256"]:
        raise ValueError("its checksum is another")
    found = json.loads(facts)
    if found.pop("format") != FORMAT:
        raise FileError(f"{path}: written by another version of repvgg; --resume never starts over")
    return State(found.pop("step"), tensors, found)


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def shared(world: World, state: State | None) -> State | None:
    """Return the first process's state in all of them: the others need not see its folder."""
    mine = ([state.step, state.facts], state.tensors) if state else (None, {})
    found, tensors = world.shared(*mine)
    return State(found[0], tensors, found[1]) if found else None
