"""Time a training step of A0 at 224 px against timm's repvgg_a0, and weigh the saved state; write results/training.json.

python results/measure_training.py [BATCH] [ROUNDS]      # on a machine that does nothing else

Each network trains in a process of its own, in each of the settings, because some of timm's die: PyTorch's backward pass of a
strided 1x1 with 3 input channels damages the heap in channels_last (see Conv1x1 in fold/blocks.py). What died is in the record.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from repvgg.measure.machine import write_record
from repvgg.measure.timing import Times, interleave, ratio
from repvgg.models import zoo
from repvgg.train.recipes import Recipe
from repvgg.train.state import State, Store
from repvgg.train.trainer import Trainer

BATCH, ROUNDS = (int(word) for word in [*sys.argv[1:], "32", "8"][:2])
SETTINGS = {
    "eager, fp32, NCHW": Recipe(channels_last=False),
    "eager, bf16, NCHW": Recipe(channels_last=False, precision="bf16"),
    "compiled, bf16, NCHW": Recipe(channels_last=False, precision="bf16", compile=True),
    "eager, fp32, NHWC": Recipe(),
    "eager, bf16, NHWC": Recipe(precision="bf16"),
    "compiled, bf16, NHWC": Recipe(precision="bf16", compile=True),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("repvgg_a0"),
    "ours": lambda: zoo.create_model("repvgg_a0"),
}


def training(whose: str, setting: str) -> tuple[Trainer, Callable[[], None]]:
    """Return a trainer, and what takes a step of it."""
    trainer = Trainer(NETWORKS[whose](), SETTINGS[setting], 1000)
    trainer.train()
    batch = (torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,)))
    return trainer, lambda: trainer.step([batch], 0.01, 0)


def serve(asked: Connection, whose: str, setting: str) -> None:
    """Take a training step whenever it is asked for."""
    _, step = training(whose, setting)
    while asked.recv():
        step()
        asked.send(True)


class Apart:
    """A training in a process of its own. A call takes a step, or does nothing once the process is dead."""

    def __init__(self, whose: str, setting: str) -> None:
        process = get_context("spawn")
        self.asked, theirs = process.Pipe()
        self.process = process.Process(target=serve, args=(theirs, whose, setting), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self) -> None:
        self.tell(True)

    def tell(self, more: bool) -> None:
        """Ask for a step, and wait for it; or for the end."""
        try:
            self.asked.send(more)
            self.asked.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()

    def died_of(self) -> str:
        """End the process if it lives, and return the signal that it died of; or ""."""
        if self.process.exitcode is None:
            self.tell(False)
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else ""


def saved_state() -> dict[str, float]:
    """Size of a saved state and seconds to write and to read it: medians of five."""
    trainer, step = training("ours", "eager, bf16, NHWC")
    step()
    with tempfile.TemporaryDirectory() as folder:
        store, writing, reading = Store(Path(folder)), [], []
        for number in range(5):
            started = time.perf_counter()
            store.save_soon(State(number, trainer.tensors(), {}))
            store.wait()
            writing.append(time.perf_counter() - started)
            started = time.perf_counter()
            store.latest()
            reading.append(time.perf_counter() - started)
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    return {"megabytes": round(size / 1e6, 1), "seconds_to_write": sorted(writing)[2], "seconds_to_read": sorted(reading)[2]}


def timed() -> tuple[dict[tuple[str, str], Times], dict[tuple[str, str], str]]:
    """Return the times of the trainings that lived through all rounds, and the signals that others died of."""
    trainings = {(whose, setting): Apart(whose, setting) for whose, setting in product(NETWORKS, SETTINGS)}
    times = interleave({", ".join(name): training for name, training in trainings.items()}, rounds=ROUNDS, batches=1, warmup=2)
    lived = {name: times[", ".join(name)] for name, training in trainings.items() if training.process.is_alive()}
    return lived, {name: death for name, training in trainings.items() if (death := training.died_of())}


def main() -> None:
    times, deaths = timed()
    print("died:", deaths)
    best = min((name for name in times if name[0] == "timm"), key=lambda name: times[name].median)
    rows: dict[str, dict[str, Any]] = {setting: {} for setting in SETTINGS}
    for whose, setting in product(NETWORKS, SETTINGS):
        t = times.get((whose, setting))
        row = rows[setting][whose] = {"img_per_s": BATCH / t.median if t else None, "died_of": deaths.get((whose, setting), "")}
        if t and whose == "ours":
            row["over_timms_best"] = asdict(ratio(times[best], t))
        print(whose, setting, row)
    state = saved_state()
    print(state)
    protocol = {"batch_size": BATCH, "rounds": ROUNDS, "input": "224 x 224, loading left out"}
    record = {"protocol": protocol, "timms_best": best[1], "steps": rows, "state": state}
    write_record(Path(__file__).with_name("training.json"), record)


if __name__ == "__main__":
    main()
