"""Half of the channels of the CIFAR-10 model, in both forms, after a short training; write results/pruning.json.

python results/measure_pruning.py runs/cifar10 hf:../shared/data/cifar10 [training] [deploy]
"""

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from repvgg import load, reparameterize
from repvgg.data import open_source
from repvgg.deploy.prune import prune
from repvgg.measure.machine import write_record
from repvgg.train.recipes import get_recipe

OUT = Path(__file__).with_name("pruning.json")
KEEP, EPOCHS, ENGINE = 0.5, 2, "openvino"


def main(run: Path, data: str, forms: list[str]) -> None:
    source = open_source(data)
    recipe = replace(get_recipe(source.recipe), epochs=EPOCHS)
    for form in forms or ["training", "deploy"]:
        model = load(run / "best.safetensors")
        with tempfile.TemporaryDirectory() as folder:
            report = prune(reparameterize(model) if form == "deploy" else model, source, folder, KEEP, recipe, engine=ENGINE)
        found = json.loads(OUT.read_text()) if OUT.exists() else {}
        found |= {"train_images": len(source.train), "recipe": asdict(recipe), form: report.to_json()}
        write_record(OUT, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
