"""Hold our timing loop against torch.utils.benchmark on the same models, taking turns; write results/timing.json.

python results/measure_timing.py          # on a machine that does nothing else; two minutes on 2 cores
"""

import json
import statistics
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
    """Return the seconds a batch by round in both, and theirs over ours."""
    model, _ = network(Candidate(name))
    engine = engines.build("eager", model, Options(batch_size=BATCH))
    images = engine.prepare(torch.randn(BATCH, 3, 224, 224))
    timer = Timer("run(images)", globals={"run": engine.run, "images": images}, num_threads=torch.get_num_threads())
    times: dict[str, list[list[float]]] = {"ours": [], "theirs": []}

    def one_of(who: str) -> float:
        """Return the mean of a round: theirs gives no other."""
        if who == "theirs":
            return timer.timeit(BATCHES).mean  # warms up once too
        return statistics.mean(interleave({who: lambda: engine.run(images)}, rounds=1, batches=BATCHES, warmup=1)[who].rounds[0])

    engine.run(images)
    for number in range(ROUNDS):
        for who in sorted(times, reverse=bool(number % 2)):
            times[who].append([one_of(who)])
    ours, theirs = times["ours"], times["theirs"]
    found = ratio(Times(theirs), Times(ours))
    print(f"{name}: torch.utils.benchmark over ours {found}")
    return {"ours": Times(ours).by_round, "torch.utils.benchmark": Times(theirs).by_round, "theirs_over_ours": asdict(found)}


if __name__ == "__main__":
    figures = {"batch_size": BATCH, "rounds": ROUNDS, "batches_a_round": BATCHES, "models": {m: compare(m) for m in MODELS}}
    write_record(Path(__file__).with_name("timing.json"), figures)
    print(json.dumps({m: r["theirs_over_ours"] for m, r in figures["models"].items()}, indent=2))  # type: ignore[attr-defined]
