"""Evaluate finished CamVid runs in both forms on the test split, time a full-size Cityscapes image, and write results/camvid.json.

repvgg train --arch pspnet_repvgg_a0_fast --width 0.25 --data camvid:../shared/data/camvid --workers 1 --out runs/camvid
python results/measure_camvid.py camvid:../shared/data/camvid runs/camvid [RUN ...]      # where there are several, of any seeds

With PICTURES=FOLDER in the environment it also leaves there four photos under the masks of the first run. NOTE=WORDS is what else
there is to say of the minutes, such as that they are not those of a quiet machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from repvgg import create_model, load, reparameterize, save
from repvgg.data import Source, open_source
from repvgg.data.masks import ToNetwork
from repvgg.data.transforms import normalise
from repvgg.measure.machine import write_record
from repvgg.models.views import Views, segment
from repvgg.models.zoo import manifest_of
from repvgg.predict.masks import class_names, colours, overlay
from repvgg.train.segmentation import Segmentation

COMPARED = 20  # photos whose masks are compared pixel by pixel with float64
SHOWN = 4
VIEWS = {"flip": Views(flip=True), "scales 0.75, 1, 1.25 and flip": Views(scales=(0.75, 1.0, 1.25), flip=True)}
FULL_SIZE = (1024, 2048)
PREDICT = """
import resource, time, torch
from repvgg import load
from repvgg.models.views import Views
from repvgg.predict.masks import predict_masks
model = load({model!r})
started = time.perf_counter()
(answer,) = predict_masks(model, [{image!r}], views=Views(slide={slide}))
seconds = time.perf_counter() - started
assert answer.mask.shape == {size}
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def evaluated(run: Path, source: Source) -> dict[str, Any]:
    """Its figures on the test split, in both forms and with more views."""
    model = load(run / "best.safetensors")
    deploy = reparameterize(model)
    task = Segmentation()
    forms = {"training form": model, "deploy form": deploy}
    figures = {form: task.evaluate_model(network, source, "test") for form, network in forms.items()}
    more = {name: task.evaluate_model(deploy, source, "test", views=views) for name, views in VIEWS.items()}
    summary = json.loads((run / "summary.json").read_text())
    found = figures["deploy form"]
    return {
        **{key: summary[key] for key in ("command", "arch", "seed", "best_mean_iou")},
        "minutes": summary["seconds"] / 60,
        "note": os.environ.get("NOTE", ""),
        "trained_on": summary["machine"],
        "recipe": json.loads((run / "recipe.json").read_text()),
        "parameters": sum(p.numel() for p in deploy.parameters()),
        "test": {form: f.figures for form, f in figures.items()} | {name: f.figures for name, f in more.items()},
        "per_class": dict(zip(source.classes, found.per_class, strict=True)),
        "masks": compared(model, deploy, source),
    }


@torch.inference_mode()
def compared(model: nn.Module, deploy: nn.Module, source: Source) -> dict[str, Any]:
    """Pixels in which the two forms' masks differ in float32, and their largest error against float64."""
    images = source.split("test")
    p = manifest_of(model).preprocessing
    to_network = ToNetwork(p)
    pixels = differ = 0
    error = 0.0
    exact = reparameterize(model).double()
    for i in range(min(COMPARED, len(images))):
        x = normalise(to_network(images[i][0]).unsqueeze(0), p)
        a, b = (segment(network, x, p.input_size[1:], ()) for network in (model.float(), deploy))
        reference = segment(exact, x.double(), p.input_size[1:], ())
        off = max(float((scores.double() - reference).abs().max()) for scores in (a, b))
        unlike = a.argmax(1) != b.argmax(1)
        pixels, differ = pixels + unlike.numel(), differ + int(unlike.sum())
        error = max(error, off / float(reference.abs().max()))
    return {"photos": min(COMPARED, len(images)), "pixels": pixels, "differ": differ, "max_rel_err": error}


def full_size() -> dict[str, Any]:
    """Seconds and peak resident memory of a process that makes one mask of 2048 x 1024 pixels: pspnet_repvgg_a0, deploy form."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model, image = str(Path(folder) / "a0.safetensors"), str(Path(folder) / "image.png")
        net = create_model("pspnet_repvgg_a0", num_classes=19, deploy=True).eval()
        manifest = manifest_of(net)
        save(net, model, preprocessing=type(manifest.preprocessing)((3, 713, 713), FULL_SIZE[0]))
        noise = np.random.default_rng(0).integers(0, 256, (*FULL_SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
        for name, slide in (("whole", False), ("slide", True)):
            code = PREDICT.format(model=model, image=image, slide=slide, size=FULL_SIZE)
            runs = [
                [float(x) for x in subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()]
                for _ in range(3)
            ]
            seconds, peak = zip(*runs, strict=True)
            found[name] = {"n": len(runs), "seconds": statistics.median(seconds), "peak_resident_bytes": int(max(peak))}
    return found


@torch.inference_mode()
def pictures(run: Path, source: Source, out: Path) -> None:
    """Photos of the test split, far apart, under their masks."""
    out.mkdir(parents=True, exist_ok=True)
    deploy = reparameterize(load(run / "best.safetensors"))
    p, images = manifest_of(deploy).preprocessing, source.split("test")
    for number in range(SHOWN):
        image, _ = images[(2 * number + 1) * len(images) // (2 * SHOWN)]
        x = normalise(ToNetwork(p)(image).unsqueeze(0), p)
        mask = segment(deploy, x, (image.shape[1], image.shape[2]), ())[0].argmax(0).to(torch.uint8)
        overlay(image, mask, colours(class_names(deploy))).save(out / f"camvid{number + 1}.jpg", quality=90)


def main(data: str, runs: list[Path]) -> None:
    started = time.perf_counter()
    source = open_source(data)
    if folder := os.environ.get("PICTURES"):
        pictures(runs[0], source, Path(folder))
    figures = {
        "what": "CamVid, 11 classes: the model that was best on the validation split, on the 233 photos of the test split, fp32",
        "photos": len(source.split("test")),
        "runs": [evaluated(run, source) for run in runs],
        "full_size": full_size(),
        "seconds": time.perf_counter() - started,
    }
    write_record(Path(__file__).with_name("camvid.json"), figures)
    for run in figures["runs"]:  # type: ignore[attr-defined]
        print(f"{run['arch']}, seed {run['seed']}: {run['test']}, masks {run['masks']}")
    print(figures["full_size"])


if __name__ == "__main__":
    main(sys.argv[1], [Path(word) for word in sys.argv[2:]])
