"""Hold our timing loop against torch.utils.benchmark on the same models, taking turns; write results/timing.json.

python results/measure_timing.py          # on a machine that does nothing else; two minutes on 2 cores
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from repvgg.bench.models import Candidate, network
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.measure.machine import write_record
from repvgg.measure.timing import Times, interleave, ratio

MODELS, BATCH, ROUNDS, BATCHES = ("repvgg_a0", "resnet18", "efficientnet_b0"), 8, 15, 4


def compare(name: str) -> dict[str, object]:
    """Seconds a batch by round in both, and theirs over ours."""
    model, _ = network(Candidate(name))
    engine = engines.build("eager", model, Options(batch_size=BATCH))
    images = engine.prepare(torch.randn(BATCH, 3, 224, 224))
    timer = Timer("run(images)", globals={"run": engine.run, "images": images}, num_threads=torch.get_num_threads())
    ours, theirs = [], []
    engine.run(images)
    for _ in range(ROUNDS):
        ours += interleave({name: lambda: engine.run(images)}, rounds=1, batches=BATCHES, warmup=1)[name].rounds
        theirs.append([timer.timeit(BATCHES).median])  # warms up once too
    found = ratio(Times(theirs), Times(ours))
    print(f"{name}: torch.utils.benchmark over ours {found}")
    return {"ours": Times(ours).by_round, "torch.utils.benchmark": Times(theirs).by_round, "theirs_over_ours": asdict(found)}


if __name__ == "__main__":
    figures = {"batch_size": BATCH, "rounds": ROUNDS, "batches_a_round": BATCHES, "models": {m: compare(m) for m in MODELS}}
    write_record(Path(__file__).with_name("timing.json"), figures)
    print(json.dumps({m: r["theirs_over_ours"] for m, r in figures["models"].items()}, indent=2))  # type: ignore[attr-defined]
