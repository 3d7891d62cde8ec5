"""Time a training step of A0 at 224 px against timm's repvgg_a0, and weigh the saved state; write results/training.json.

python results/measure_training.py [BATCH] [ROUNDS]      # on a machine that does nothing else
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
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
REFERENCE = "timm, eager, fp32, NCHW"
VARIANTS: dict[str, tuple[Callable[[], nn.Module], Recipe]] = {
    REFERENCE: (lambda: timm.create_model("repvgg_a0"), Recipe(channels_last=False)),
    "ours, eager, fp32, NCHW": (lambda: zoo.create_model("repvgg_a0"), Recipe(channels_last=False)),
    "timm, eager, bf16, NCHW": (lambda: timm.create_model("repvgg_a0"), Recipe(channels_last=False, precision="bf16")),
    "ours, eager, bf16, NCHW": (lambda: zoo.create_model("repvgg_a0"), Recipe(channels_last=False, precision="bf16")),
    "ours, eager, fp32, NHWC": (lambda: zoo.create_model("repvgg_a0"), Recipe()),
    "ours, eager, bf16, NHWC": (lambda: zoo.create_model("repvgg_a0"), Recipe(precision="bf16")),
    "ours, compiled, bf16, NHWC": (lambda: zoo.create_model("repvgg_a0"), Recipe(precision="bf16", compile=True)),
}


def stepper(trainer: Trainer) -> Callable[[], Any]:
    batch = (torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,)))
    return lambda: trainer.step([batch], 0.01, 0)


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
    trainers = {name: Trainer(make(), recipe, 1000) for name, (make, recipe) in VARIANTS.items()}
    for trainer in trainers.values():
        trainer.train()
    times = interleave({name: stepper(t) for name, t in trainers.items()}, rounds=ROUNDS, batches=1, warmup=2)
    rows = {}
    for name, t in times.items():
        others = [other for other in (REFERENCE, name.replace("ours", "timm")) if other in times]
        rows[name] = {
            "img_per_s": BATCH / t.median,
            "quartiles": [BATCH / s for s in reversed(t.quartiles)],
            "faster_than": {other: asdict(ratio(times[other], t)) for other in others},
        }
        print(f"{name}: {BATCH / t.median:.1f} img/s, {ratio(times[REFERENCE], t)} times {REFERENCE}")
    protocol = {"batch_size": BATCH, "rounds": ROUNDS, "input": "224 x 224, loading left out"}
    state = state_of(trainers["ours, eager, fp32, NHWC"])
    print(state)
    write_record(Path(__file__).with_name("training.json"), {"protocol": protocol, "steps": rows, "state": state})


if __name__ == "__main__":
    main()
