"""PSPNet on ResNet-50 and on RepVGG-B1g2-fast (Table 8), a quarter as wide, trained alike on CamVid; write results/table8.json.

python results/measure_table8.py camvid:../shared/data/camvid runs/table8 --epochs 30     # hours; stop and start it at will
python results/measure_table8.py camvid:PHOTOS /tmp/t8 --epochs 1 --limit 8 --width 0.0625 --record /tmp/t8.json    # a trial

Both see the same photos in the same order, by the recipe of the data, with one seed, from random weights (the paper starts from
ImageNet's). Then both are evaluated on the test split, and timed in deploy form, taking turns.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from measure_camvid import evaluated

from repvgg import load, reparameterize
from repvgg.data import open_source
from repvgg.deploy.load import load_engine
from repvgg.deploy.speedup import speedup
from repvgg.measure.costs import cost
from repvgg.measure.machine import write_record
from repvgg.models.zoo import manifest_of
from repvgg.paper.numbers import TABLE8
from repvgg.train.loop import train
from repvgg.train.recipes import get_recipe

MODELS = ("pspnet_resnet50", "pspnet_repvgg_b1g2_fast")
PRINTED = {row.model: {"mean_iou": row.miou, "speed": row.speed} for row in TABLE8}
ENGINE = "eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default=",".join(MODELS), help="the one to compare with first")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path(__file__).with_name("table8.json"))
    asked = parser.parse_args()
    source = open_source(asked.data).limited(asked.limit)
    recipe = get_recipe(source.recipe)
    recipe = replace(recipe, epochs=asked.epochs or recipe.epochs)
    runs, runners = [], []
    for arch in asked.models.split(","):
        train(arch, source, recipe, asked.out / arch, workers=asked.workers, width=asked.width)
        deploy = reparameterize(load(asked.out / arch / "best.safetensors"))
        macs = cost(deploy, manifest_of(deploy).preprocessing.input_size).macs
        runs.append({**evaluated(asked.out / arch, source), "macs": macs, "paper": PRINTED.get(arch)})
        runners.append(load_engine(deploy, ENGINE, batch_size=1))
    figures = {
        "what": "CamVid, 11 classes: the model that was best on the validation split, on the test split, fp32, n = 1",
        "photos": len(source.split("test")),
        "width": asked.width,
        "runs": runs,
        "speed": {"engine": ENGINE, "input_size": runners[0].options.input_size, **speedup(*runners[:2]).to_json()},
    }
    write_record(asked.record, figures)


if __name__ == "__main__":
    main()
