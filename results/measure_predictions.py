"""Predictions of the native engine on a whole validation split beside PyTorch's: writes results/predictions.json.

python results/measure_predictions.py src/repvgg/models/cifar10.safetensors hf:../shared/data/cifar10

A prediction is clear as in repvgg/deploy/parity.py: by its lead over the next label, whatever the engine's error.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import repvgg_engine
import torch
from numpy.typing import NDArray

from repvgg import load, reparameterize, save
from repvgg.data import open_source
from repvgg.data.transforms import eval_transform, normalise
from repvgg.deploy.parity import CLEAR, clear_ones
from repvgg.deploy.quantize import quantize
from repvgg.measure.machine import write_record
from repvgg.models.zoo import manifest_of

BATCH = 100
# int8: of a file that is calibrated first, as `repvgg quantize --to native` does it.
ENGINES = (
    ("fp32", "exact"),
    ("fp32", "high"),
    ("fp32", "fast"),
    ("bf16", "high"),
    ("int16", "high"),
    ("int16", "fast"),
    ("int8", "high"),
)


def compared(logits: NDArray[Any], exact: NDArray[Any]) -> dict[str, Any]:
    off = float(np.abs(logits - exact).max())
    clear = clear_ones(torch.from_numpy(exact)).numpy()
    unlike = logits.argmax(1) != exact.argmax(1)
    return {
        "images": len(exact),
        "differ": int(unlike.sum()),
        "clear": int(clear.sum()),
        "differ_where_clear": int((unlike & clear).sum()),
        "max_rel_err": off / float(np.abs(exact).max()),
    }


def main(file: str, data: str) -> None:
    model = reparameterize(load(file).float())  # the embedded one is stored in half precision
    source, p = open_source(data), manifest_of(model).preprocessing
    transform = eval_transform(p)
    images = torch.stack([transform(source.val[i][0]) for i in range(len(source.val))])
    exact_model = reparameterize(load(file)).double()
    batches = [normalise(part, p) for part in images.split(BATCH)]
    with torch.inference_mode():
        exact = torch.cat([exact_model(part.double()) for part in batches]).numpy()
        figures = {"PyTorch": compared(torch.cat([model(part) for part in batches]).numpy(), exact)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deploy.safetensors"
        save(model, path)
        calibrated = quantize(load(file).float(), source, "native", folder).path
        for precision, accuracy in ENGINES:
            if precision == "bf16" and "bf16" not in repvgg_engine.instruction_sets():
                continue
            of = calibrated if precision == "int8" else path
            net = repvgg_engine.load(of, precision=precision, accuracy=accuracy, threads=torch.get_num_threads())
            logits = np.concatenate([net(part.numpy()) for part in batches])
            figures[f"{precision} {accuracy}"] = compared(logits, exact)
    write_record(
        Path(__file__).with_name("predictions.json"),
        {"model": manifest_of(model).arch, "data": source.name, "clear": CLEAR, "engines": figures},
    )
    for name, found in figures.items():
        print(name, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
