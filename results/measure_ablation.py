"""Tables 6 and 7 on CIFAR-10 with a narrow B0: train what is not trained yet, then write results/ablation.json and .png.

python results/measure_ablation.py hf:../shared/data/cifar10 runs/ablation                     # stop and start it at will
python results/measure_ablation.py hf:../shared/data/cifar10 runs/ablation --seeds 1           # the first seed alone
python results/measure_ablation.py hf:... runs/ablation-gpu --width 0.5 --epochs 16 --device cuda --workers 8

Further words go to `repvgg ablate` after those of FLAGS, the later ones counting. Cells are worked on seed by seed.
"""

import json
import shlex
import sys
from pathlib import Path

from repvgg.cli import main as repvgg
from repvgg.disk import atomically
from repvgg.measure.machine import write_record

FLAGS = "--arch repvgg_b0 --width 0.125 --epochs 6 --seeds 3"


def main(data: str, out: Path, *more: str) -> None:
    words = ["ablate", "--data", data, *FLAGS.split(), *more, "--out", str(out)]
    repvgg(words)
    found = json.loads((out / "ablation.json").read_text())
    here = Path(__file__)
    write_record(here.with_name("ablation.json"), {"command": shlex.join(["repvgg", *words]), **found["data"]})
    atomically(here.with_name("ablation.png"), lambda path: path.write_bytes((out / "ablation.png").read_bytes()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
