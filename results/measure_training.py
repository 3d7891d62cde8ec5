"""Time a training step of A0 at 224 px against timm's repvgg_a0, and weigh the saved state; write results/training.json.

python results/measure_training.py [BATCH] [ROUNDS]      # on a machine that does nothing else
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from repvgg.measure.machine import write_record
from repvgg.measure.timing import interleave, ratio
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
STEPS = 20  # in which a heap that is damaged in each one is found to be


def stepper(trainer: Trainer) -> Callable[[], Any]:
    batch = (torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,)))
    return lambda: trainer.step([batch], 0.01, 0)


def trainer_of(whose: str, setting: str) -> Trainer:
    trainer = Trainer(NETWORKS[whose](), SETTINGS[setting], 1000)
    trainer.train()
    return trainer


def steps(whose: str, setting: str) -> None:
    step = stepper(trainer_of(whose, setting))
    for _ in range(STEPS):
        step()


def death(whose: str, setting: str) -> str:
    """Return the signal that a process dies of which trains so (oneDNN's backward of a strided 1x1: see fold/blocks.py), or ""."""
    child = get_context("spawn").Process(target=steps, args=(whose, setting))
    child.start()
    child.join()
    return signal.Signals(-child.exitcode).name if child.exitcode else ""


def state_of(trainer: Trainer) -> dict[str, float]:
    """Size of a saved state and seconds to write and to read it: medians of five."""
    with tempfile.TemporaryDirectory() as folder:
        store, writing, reading = Store(Path(folder)), [], []
        for step in range(5):
            started = time.perf_counter()
            store.save_soon(State(step, trainer.tensors(), {}))
            store.wait()
            writing.append(time.perf_counter() - started)
            started = time.perf_counter()
            store.latest()
            reading.append(time.perf_counter() - started)
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    return {"megabytes": round(size / 1e6, 1), "seconds_to_write": sorted(writing)[2], "seconds_to_read": sorted(reading)[2]}


def main() -> None:
    # timm's network in NHWC is never run in this process: it damages the heap, sooner or later.
    deaths = {setting: death("timm", setting) for setting, recipe in SETTINGS.items() if recipe.channels_last}
    print(f"timm's in NHWC: {deaths}")
    trainers = {
        (whose, setting): trainer_of(whose, setting)
        for whose, setting in product(NETWORKS, SETTINGS)
        if whose == "ours" or setting not in deaths
    }
    times = interleave({", ".join(name): stepper(t) for name, t in trainers.items()}, rounds=ROUNDS, batches=1, warmup=2)
    best = min((setting for whose, setting in trainers if whose == "timm"), key=lambda setting: times[f"timm, {setting}"].median)
    rows = {}
    for setting in SETTINGS:
        timm_s, ours_s = times.get(f"timm, {setting}"), times[f"ours, {setting}"]
        rows[setting] = {
            "timm": BATCH / timm_s.median if timm_s else deaths[setting] or "not timed",
            "ours": BATCH / ours_s.median,
            "over_timms_best": asdict(ratio(times[f"timm, {best}"], ours_s)),
        }
        print(setting, rows[setting])
    protocol = {"batch_size": BATCH, "rounds": ROUNDS, "input": "224 x 224, loading left out"}
    state = state_of(trainers["ours", "eager, fp32, NHWC"])
    print(state)
    write_record(
        Path(__file__).with_name("training.json"), {"protocol": protocol, "timms_best": best, "steps": rows, "state": state}
    )


if __name__ == "__main__":
    main()
