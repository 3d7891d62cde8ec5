"""Publish a model on the Hugging Face hub, with a card that says what was measured.

    push_to_hub("runs/cats/best.safetensors", "me/cats", license="mit")
    model = repvgg.from_pretrained("me/cats")

What is uploaded: model.safetensors (see checkpoint.py), config.json (its manifest, for people and other programs), and the card,
README.md. Where timm has the network too, the tensors have timm's names and config.json says what timm and transformers ask: these
open the repository without repvgg.
"""

import copy
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from repvgg.disk import read_text, write_text
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import cost
from repvgg.models import hub
from repvgg.models.convert import proof_size
from repvgg.models.in_timm import timm_config
from repvgg.models.load import load, save
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.names import in_run_folder
from repvgg.models.zoo import manifest_of
from repvgg.version import __version__

MARK = "<!-- Written by repvgg. Take this line away, and the next push will leave this card as it is. -->"
PIPELINES = {"labels": "image-classification", "masks": "image-segmentation"}
MEASURES = {"val_top1": ("accuracy", "top-1"), "val_mean_iou": ("mean_iou", "mean IoU")}


def push_to_hub(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    license: str = "",
    private: bool = False,
    summary: dict[str, Any] | None = None,
    message: str = "",
    token: str | None = None,
) -> str:
    """Upload a model, or a model file, in the form that it is in, and return the address of the commit.

    repo_id: USER/NAME, made if it is not there. license: an identifier of the hub's, such as mit. summary: of the run, by default
    the summary.json beside the file. A card that somebody has made their own is left as it is. Raises `FileError` for a model that
    cannot be read or uploaded, ValueError without a token.
    """
    if not isinstance(model, nn.Module):
        path = Path(model)
        with suppress(OSError, ValueError):
            summary = summary or json.loads(read_text(in_run_folder(path).parent / "summary.json"))
        model = load(path)
    if model.training:
        model = copy.deepcopy(model).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(model, folder)
        if _may_write_card(repo_id, token):
            (folder / "README.md").write_text(model_card(model, repo_id, license, summary))
        return hub.upload(folder, repo_id, message or f"Upload by repvgg {__version__}", private, token)


def write_model(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors and config.json into a folder. Where timm has the network, it and transformers open that."""
    manifest = manifest_of(model)
    theirs = timm_config(manifest)
    keys = "timm" if theirs else "repvgg"
    save(model, folder / hub.MODEL_FILE, to_keys=keys)
    config = json.dumps({**json.loads(manifest.to_json()), "keys": keys, **(theirs or {})}, indent=2) + "\n"
    write_text(folder / "config.json", config)


def _may_write_card(repo_id: str, token: str | None) -> bool:
    try:
        return MARK in hub.fetch(repo_id, file="README.md", token=token).read_text()
    except hub.MissingError:
        return True


def model_card(model: nn.Module, repo_id: str, license: str = "", summary: dict[str, Any] | None = None) -> str:
    """Return the README.md of a model in eval mode. Figures are of its training and its run, and what is computed here: costs,
    and how exactly it folds."""
    manifest = manifest_of(model)
    name = str((manifest.arch or {}).get("name", "pruned network"))
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    rows = [*_accuracy(manifest), *_costs(model, manifest), *_run(manifest, summary or {})]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
{_metadata(manifest, repo_id, license)}
---

{MARK}

# {repo_id.split("/")[-1]}

`{name}` in {manifest.form} form{classes}, a [RepVGG](https://arxiv.org/abs/2101.03697) model written by repvgg {__version__}.

```python
import repvgg

model = repvgg.from_pretrained("{repo_id}")  # in eval mode
deploy = repvgg.reparameterize(model)  # 3x3 convolutions and ReLU
```

`repvgg predict hf:{repo_id} photo.jpg` does the same from the command line.
{_elsewhere(manifest, repo_id)}
| | |
| --- | --- |
{table}

{_input(manifest.preprocessing)}
{_listed(manifest.classes)}"""


def _elsewhere(manifest: Manifest, repo_id: str) -> str:
    """Return how to open it without repvgg, where that can be."""
    if timm_config(manifest) is None:
        return ""
    return f"""
```python
model = timm.create_model("hf-hub:{repo_id}", pretrained=True)  # without repvgg; or, in transformers:
model = transformers.AutoModelForImageClassification.from_pretrained("{repo_id}")
```
"""


def _metadata(manifest: Manifest, repo_id: str, license: str) -> str:
    """Return the card's front matter, as the hub's own library writes it."""
    from huggingface_hub import EvalResult, ModelCardData

    arch = str((manifest.arch or {}).get("name", ""))
    task = PIPELINES[manifest.task]
    data = _data(manifest)
    results = [
        EvalResult(task, data, data, metric, manifest.training[key], metric_name=spoken)
        for key, (metric, spoken) in MEASURES.items()
        if key in manifest.training and data
    ]
    card = ModelCardData(
        library_name="repvgg",
        pipeline_tag=task,
        tags=["repvgg", "structural-reparameterization", "pytorch", *["timm"] * bool(timm_config(manifest)), *[arch] * bool(arch)],
        license=license or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _accuracy(manifest: Manifest) -> list[tuple[str, str]]:
    return [
        (f"{spoken} on {_data(manifest)}, validation", f"{manifest.training[key]:.2%}")
        for key, (_, spoken) in MEASURES.items()
        if isinstance(manifest.training.get(key), float)
    ]


def _data(manifest: Manifest) -> str:
    """Return what it was trained on; of a path on somebody's disk, the last part."""
    data = str(manifest.training.get("data", ""))
    place = data.partition(":")[2] or data
    return _plain(Path(place).name if place.startswith((".", "/", "~")) else place)


def _costs(model: nn.Module, manifest: Manifest) -> list[tuple[str, str]]:
    size = manifest.preprocessing.input_size
    deploy = reparameterize(model)
    c = cost(deploy, size)
    rows = [
        ("parameters, deploy form", f"{c.params / 1e6:.2f} M"),
        ("multiply-adds", f"{c.macs / 1e9:.3f} G"),
        ("multiplications by Winograd F(2x2, 3x3)", f"{c.winograd_muls / 1e9:.3f} G"),
    ]
    if manifest.form == "training":
        error = verify(model, deploy, proof_size(manifest.preprocessing)).max_rel_err
        rows.append(("largest relative error of the deploy form, against float64", f"{error:.1e}"))
    return rows


def _run(manifest: Manifest, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how it was trained; no paths of the machine that it was trained on."""
    recipe = manifest.training.get("recipe") or {}
    shown = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "mixup", "precision")
    machine = summary.get("machine") or {}
    rows = [
        ("recipe", ", ".join(f"{key.replace('_', ' ')} {_plain(recipe[key])}" for key in shown if recipe.get(key))),
        ("source", _plain(manifest.training.get("source", ""))),
        ("training time", f"{float(summary.get('seconds') or 0) / 60:.1f} min" if summary.get("seconds") else ""),
        ("trained on", _plain(machine.get("gpu") or machine.get("processor") or "")),
    ]
    return [(what, value) for what, value in rows if value]


def _input(p: Preprocessing) -> str:
    size, mean, std = (" ".join(f"{x:g}" for x in numbers) for numbers in (p.input_size, p.mean, p.std))
    return f"Input: {size.replace(' ', ' x ')}, short side resized to {p.resize} ({p.interpolation}), mean {mean}, deviation {std}."


def _listed(classes: list[str] | None) -> str:
    if not classes:
        return ""
    more = f" and {len(classes) - 50} more" if len(classes) > 50 else ""
    return f"\nClasses: {', '.join(map(_plain, classes[:50]))}{more}.\n"


def _plain(text: Any) -> str:
    """Return a stranger's words without markup."""
    return re.sub(r"[^\w.,:;/()+%@# -]+", " ", str(text))[:200].strip()
