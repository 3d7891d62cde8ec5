"""Evaluate a finished CIFAR-10 run in both forms and write results/cifar10.json.

repvgg train --arch repvgg_micro --data hf:../shared/data/cifar10 --epochs 18 --compile --out runs/cifar10
python results/measure_cifar10.py runs/cifar10 hf:../shared/data/cifar10
"""

import json
import sys
from pathlib import Path

import torch

from repvgg import load, reparameterize
from repvgg.data import open_source
from repvgg.measure.machine import write_record
from repvgg.models.zoo import manifest_of
from repvgg.train.evaluate import batches, evaluate


def main(run: Path, data: str) -> None:
    source = open_source(data)
    model = load(run / "last.safetensors")
    forms = {"training form": model, "deploy form": reparameterize(model)}
    manifest = manifest_of(model)
    top1, labels, margins = {}, {}, {}
    for form, network in forms.items():
        network = network.to(memory_format=torch.channels_last)
        kept: list[torch.Tensor] = []

        def forward(x: torch.Tensor, network: torch.nn.Module = network, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(network(x))
            return kept[-1]

        accuracy = evaluate(forward, batches(source.val, manifest.preprocessing, 250), len(source.classes))
        logits = torch.cat(kept)
        best = logits.topk(2).values
        top1[form], labels[form], margins[form] = accuracy.top1, logits.argmax(1), float((best[:, 0] - best[:, 1]).min())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    write_record(
        Path(__file__).with_name("cifar10.json"),
        {
            "what": "CIFAR-10 test accuracy of the last model of one run, fp32 evaluation",
            "command": summary["command"],
            "recipe": json.loads((run / "recipe.json").read_text()),
            "n": 1,
            "top1": top1,
            "images": len(source.val),
            "equal_predictions": int((labels["training form"] == labels["deploy form"]).sum()),
            "smallest_margin": margins["training form"],
            "minutes": summary["seconds"] / 60,
            "top1_by_epoch": [line["val_top1"] for line in lines if "val_top1" in line],
            "parameters": {form: sum(p.numel() for p in network.parameters()) for form, network in forms.items()},
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
