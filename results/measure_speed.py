"""Time RepVGG against the ResNets of the paper's headlines, and both forms, in every engine; write results/speed.json.

python results/measure_speed.py [ENGINE ...]      # on a machine that does nothing else; by default all engines

Each pair's figures are written as soon as they are known, and those of other engines stay.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from records import keep, say

from repvgg.bench.models import Candidate, bench, candidates
from repvgg.disk import in_a_line

# Faster, slower, how many times in the paper; forms of the two.
PAIRS = (
    ("repvgg_a0", "deploy", "resnet18", "deploy", 1.33),
    ("repvgg_a2", "deploy", "resnet50", "deploy", 1.83),
    ("repvgg_a0", "deploy", "repvgg_a0", "training", None),
    ("repvgg_b0", "deploy", "repvgg_b0", "training", 1.71),
)
BATCH, ROUNDS, BATCHES, WARMUP = 32, 10, 1, 2
OUT = Path(__file__).with_name("speed.json")


def measure(fast: Candidate, slow: Candidate, paper: float | None) -> dict[str, Any]:
    """Time the two, taking turns. Raises ValueError, with the reason, where the engine cannot run one of them."""
    told: list[str] = []

    def log(line: str) -> None:
        told.append(line)
        say(line)

    report = bench([slow, fast], batch_size=BATCH, rounds=ROUNDS, batches=BATCHES, warmup=WARMUP, log=log, progress=str)
    if len(report.rows) < 2:
        raise ValueError(next(line for line in told if line.startswith("left out: ")).removeprefix("left out: "))
    reference, row = report.rows
    say(f"{fast.name} over {slow.name}: {row.ratio}, in the paper {paper}")
    return {
        "fast": asdict(fast),
        "slow": asdict(slow),
        "paper": paper,
        "batch_size": [row.batch_size, reference.batch_size],  # smaller than asked for where memory ran out
        "ratio": asdict(row.ratio),
        "images_per_second": [row.images_per_second, reference.images_per_second],
        "quartiles": [row.spread, reference.spread],
    }


def main() -> None:
    about = {"protocol": {"batch_size": BATCH, "rounds": ROUNDS, "batches_a_round": BATCHES, "warmup": WARMUP}}
    known = json.loads(OUT.read_text())["pairs"] if OUT.exists() else {}
    for c in candidates(["repvgg_a0"], sys.argv[1:] or ["all"], ["fp32"], log=say):
        for fast, form, slow, other, paper in PAIRS:
            pair = replace(c, model=fast, form=form), replace(c, model=slow, form=other)
            name = f"{pair[0].name} over {pair[1].name}"
            try:
                figures = measure(*pair, paper)
            except Exception as error:  # an engine's own, of any kind: the other pairs and engines are worth having
                say(f"left out: {name}: {in_a_line(error)}")
                figures = {"fast": asdict(pair[0]), "slow": asdict(pair[1]), "paper": paper, "left_out": in_a_line(error)}
            if "ratio" in figures or "ratio" not in known.get(name, {}):  # a failure does not take the place of a figure
                keep(OUT, f"pairs/{name}", figures, about)


if __name__ == "__main__":
    main()
