"""Half of the channels taken out of trained models, then a short training; write results/pruning.json.

python results/measure_pruning.py forms runs/cifar10 hf:../shared/data/cifar10         # the CIFAR-10 model, in both forms
python results/measure_pruning.py structures runs/structures hf:../shared/data/cifar10 # plain against residual (section 3.1)

Each stops and starts at will. The structures are RepVGG-B0, which is folded to plain layers before it is pruned, and Table 7's
residual reorganisation of its layers; both trained and pruned alike with three seeds, the residual ones to as many MACs as the
plain ones have left.
"""

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from plain_recipe import PLAIN
from records import keep
from torch import nn

from repvgg import load, reparameterize
from repvgg.data import open_source
from repvgg.deploy.prune import prune, pruned
from repvgg.measure.costs import cost
from repvgg.models.zoo import manifest_of
from repvgg.train.loop import train
from repvgg.train.recipes import get_recipe

OUT = Path(__file__).with_name("pruning.json")
KEEP, EPOCHS, ENGINE = 0.5, 2, "openvino"
STRUCTURES: dict[str, dict[str, Any]] = {
    "plain": {"arch": "repvgg_b0"},
    "residual": {"arch": "repvgg_b0_residual"},
}
WIDTH, FIRST_EPOCHS, AFTER_EPOCHS, SEEDS = 0.25, 6, 2, 3
HALVINGS = 10  # of the span of shares that are looked through


def forms(run: Path, data: str) -> None:
    source = open_source(data)
    # Of so few epochs none is for warming up, or for smaller images, and there is no average of weights to wait for.
    recipe = replace(get_recipe(source.recipe), epochs=EPOCHS, warmup_epochs=0, small_first=0, ema=0)
    recipe = replace(recipe, optimizer="sgd", batch_size=128, lr=0.05)
    for form in ("training", "deploy"):
        model = load(run / "last.safetensors")  # the one that comes with the package
        with tempfile.TemporaryDirectory() as folder:
            report = prune(reparameterize(model) if form == "deploy" else model, source, folder, KEEP, recipe, engine=ENGINE)
        figures = {"arch": (manifest_of(model).arch or {}).get("name"), **report.to_json()}
        keep(OUT, form, figures, {"train_images": len(source.train), "recipe": asdict(recipe)})


def structures(out: Path, data: str) -> None:
    source = open_source(data)
    recipe = replace(PLAIN, epochs=FIRST_EPOCHS, warmup_epochs=0.5)
    after = replace(recipe, epochs=AFTER_EPOCHS, warmup_epochs=0, lr=recipe.lr / 4)
    about = {"width": WIDTH, "train_images": len(source.train), "recipe": asdict(recipe), "after": asdict(after)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STRUCTURES}
    for seed in range(SEEDS):
        for name, network in STRUCTURES.items():  # the plain one first, whose MACs the other one is brought to
            run = out / f"{name}-{seed}"
            train(source=source, recipe=recipe, out=run, seed=seed, width=WIDTH, small_input=False, **network)
            model = load(run / "last.safetensors")
            if name == "plain":
                model, share = reparameterize(model), KEEP
            else:
                share = share_left(model, found["plain"][0]["macs"][1])
            found[name].append(prune(model, source, out / f"{name}-{seed}-pruned", share, after, seed=seed).to_json())
        keep(OUT, "structures", {**about, **found})


def share_left(model: nn.Module, macs: int) -> float:
    """Return the share of its channels with which a network of plain layers has as many MACs as it can up to `macs`."""
    size = manifest_of(model).preprocessing.input_size
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))  # which channels stay has no part in the count
    low, high = 0.0, 1.0  # bisected: more channels never have fewer MACs
    for _ in range(HALVINGS):
        keep = (low + high) / 2
        if cost(pruned(model, images, keep), size).macs > macs:
            high = keep
        else:
            low = keep
    return low


if __name__ == "__main__":
    {"forms": forms, "structures": structures}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
