"""Time RepVGG against the ResNets of the paper's headlines, and both forms, in every engine; write results/speed.json.

python results/measure_speed.py [ENGINE ...]      # on a machine that does nothing else; by default all engines
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from records import say

from repvgg.bench.models import Candidate, bench, candidates
from repvgg.measure.machine import write_record

# Faster, slower, how many times in the paper; forms of the two.
PAIRS = (
    ("repvgg_a0", "deploy", "resnet18", "deploy", 1.33),
    ("repvgg_a2", "deploy", "resnet50", "deploy", 1.83),
    ("repvgg_a0", "deploy", "repvgg_a0", "training", None),
    ("repvgg_b0", "deploy", "repvgg_b0", "training", 1.71),
)
BATCH, ROUNDS, BATCHES, WARMUP = 32, 10, 1, 2


def measure(fast: Candidate, slow: Candidate, paper: float | None) -> dict[str, Any]:
    """Time the two, taking turns."""
    report = bench(
        [slow, fast], batch_size=BATCH, rounds=ROUNDS, batches=BATCHES, warmup=WARMUP, log=say, progress=lambda line: None
    )
    reference, row = report.rows
    say(f"{fast.name} over {slow.name}: {row.ratio}, in the paper {paper}")
    return {
        "fast": asdict(fast),
        "slow": asdict(slow),
        "paper": paper,
        "ratio": asdict(row.ratio),
        "images_per_second": [row.images_per_second, reference.images_per_second],
        "quartiles": [row.spread, reference.spread],
    }


def main() -> None:
    engines = [(c.engine, c.precision) for c in candidates(["repvgg_a0"], sys.argv[1:] or ["all"], ["fp32"], log=say)]
    pairs = [
        measure(Candidate(fast, *engine, form), Candidate(slow, *engine, other), paper)
        for engine in engines
        for fast, form, slow, other, paper in PAIRS
    ]
    protocol = {"batch_size": BATCH, "rounds": ROUNDS, "batches_a_round": BATCHES, "warmup": WARMUP}
    write_record(Path(__file__).with_name("speed.json"), {"protocol": protocol, "pairs": pairs})


if __name__ == "__main__":
    main()
