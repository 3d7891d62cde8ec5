"""Evaluate finished CIFAR-10 runs in every form, write results/cifar10.json, and put the first one's model into the package.

repvgg train --arch repvgg_mini --data hf:../shared/data/cifar10 --recipe cifar --out runs/cifar10      # an hour of two cores
python results/measure_cifar10.py runs/cifar10 --data hf:../shared/data/cifar10 --embed

More runs are those of other seeds; runs measured before stay in the record. --embed: src/repvgg/models/cifar10.safetensors is
the deploy form in float16, and what it recognises is measured from that file. --note: what else there is to say of the minutes,
such as what ran beside.
"""

import argparse
import json
import tempfile
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import Any

import repvgg_engine
import torch
from records import keep
from torch import Tensor

from repvgg import load, reparameterize, save
from repvgg.data import Source, open_source
from repvgg.models.names import EMBEDDED
from repvgg.models.zoo import manifest_of
from repvgg.train.evaluate import batches
from repvgg.web.drawing import IDENTITY, INK, MUTED, POINTWISE, RULE, WIDEST, plot

OUT = Path(__file__).with_name("cifar10.json")
BATCH = 250


@torch.inference_mode()
def logits(network: Any, source: Source, preprocessing: Any) -> Tensor:
    """Return what a network says of every held-out image, in order."""
    return torch.cat([torch.as_tensor(network(x)) for x, _ in batches(source.val, preprocessing, BATCH)])


def forms(run: Path, source: Source, labels: Tensor) -> dict[str, Any]:
    """Return top-1 of both forms of a run's last model, and of the native engine, and how many predictions are the same."""
    model = load(run / "last.safetensors")
    deploy, p = reparameterize(model), manifest_of(model).preprocessing
    with tempfile.TemporaryDirectory() as folder:
        save(deploy, Path(folder) / "deploy.safetensors")
        net = repvgg_engine.load(Path(folder) / "deploy.safetensors", threads=torch.get_num_threads())
        found = {
            "training form": logits(model, source, p),
            "deploy form": logits(deploy, source, p),
            "native engine": logits(lambda x: net(x.contiguous().numpy()), source, p),
        }
    predicted = {name: values.argmax(1) for name, values in found.items()}
    best = found["training form"].topk(2).values
    return {
        "top1": {name: float((p == labels).double().mean()) for name, p in predicted.items()},
        "equal_predictions": {name: int((p == predicted["training form"]).sum()) for name, p in predicted.items()},
        "smallest_margin": float((best[:, 0] - best[:, 1]).min()),
        "parameters": {"training form": _count(model), "deploy form": _count(deploy)},
    }


def history(run: Path) -> dict[str, Any]:
    """Return how a run was made, and its accuracy by images seen and by minutes."""
    summary, recipe = (json.loads((run / name).read_text()) for name in ("summary.json", "recipe.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {"images": line["step"] * recipe["batch_size"], "minutes": line["seconds"] / 60, "top1": line["val_top1"]}
        for line in lines
        if "val_top1" in line
    ]
    kept = {name: summary[name] for name in ("command", "seed", "arch", "machine")}
    return {**kept, "recipe": recipe, "minutes": summary["seconds"] / 60, "curve": curve}


def embed(run: Path, source: Source, labels: Tensor) -> dict[str, Any]:
    """Put a run's last model into the package, in float16, and measure that file."""
    deploy, path = reparameterize(load(run / "last.safetensors")), EMBEDDED["cifar10"]
    manifest = manifest_of(deploy)
    save(deploy.half(), path, training={"data": "CIFAR-10", **{k: v for k, v in manifest.training.items() if k == "seed"}})
    found = logits(load(path).float(), source, manifest.preprocessing).argmax(1)
    top1 = float((found == labels).double().mean())
    save(deploy.half(), path, training={**manifest_of(load(path)).training, "val_top1": top1})
    recipe = json.loads((run / "recipe.json").read_text())
    of = {"arch": (manifest.arch or {}).get("name"), "epochs": recipe["epochs"], "seed": manifest.training.get("seed")}
    told = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
    return {**of, **told, "stored_as": "float16", "top1": top1}


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the accuracy of each run against its minutes, as PNG; points whose minutes are not known are left out."""
    figure, (axes,) = plot(700, 400)
    for (name, run), (_, colour) in zip(runs.items(), cycle((WIDEST, POINTWISE, IDENTITY)), strict=False):
        points = [(point["minutes"], 100 * point["top1"]) for point in run["curve"] if point["minutes"] is not None]
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=name)
    axes.set_title("top-1 on CIFAR-10's test images, %", fontsize=11, color=INK, loc="left")
    axes.set_xlabel("minutes of training", fontsize=9, color=MUTED)
    axes.grid(color=RULE, linewidth=0.4)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=200)


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--embed", action="store_true")
    parser.add_argument("--note", default="")
    asked = parser.parse_args()
    source = open_source(asked.data)
    labels = torch.tensor([int(source.val[i][1]) for i in range(len(source.val))])
    what = "CIFAR-10 test accuracy of the last model of each run, evaluated in fp32 at one view"
    for folder in asked.runs:
        run = {**history(folder), **forms(folder, source, labels), "note": asked.note}
        name = f"{run['arch']}, {run['recipe']['epochs']} epochs, seed {run['seed']}"
        keep(OUT, f"runs/{name}", run, {"what": what, "images": len(source.val)})
    if asked.embed:
        keep(OUT, "embedded", embed(asked.runs[0], source, labels))
    draw(json.loads(OUT.read_text())["runs"], OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
