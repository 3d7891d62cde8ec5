"""The steps of gpu.py that train: CIFAR-10 with A0, and Tables 6 and 7. Images and augmentation live on the device.

Networks train one after the other, each in a process of its own and to its end: processes would share a GPU by turns alone.
"""

import hashlib
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_steps import Asked, Record, Stepper
from plain_recipe import PLAIN
from torch import Tensor

from repvgg.data.resident import Resident, Shifts
from repvgg.disk import atomically, write_text
from repvgg.fold.algebra import ReparamError
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.machine import this_machine
from repvgg.models import zoo
from repvgg.paper.numbers import TABLE6, TABLE7
from repvgg.train.recipes import Recipe

# What `Stepper` does of it: no moving average, one size of images.
RECIPE = replace(PLAIN, lr=0.1, batch_size=128, decay="cosine")
COMPILING = 180.0  # seconds that a process must have for compiling to pay: it takes up to a minute
SAVING = 15.0  # seconds of training that a kill may cost at most, beside an epoch
PART = 48_000_000  # bytes of images in a packed file: what carries files to a machine may refuse larger ones


@dataclass(frozen=True)
class Job:
    """One network to train with one seed; its figures so far are in `out`."""

    arch: str
    options: dict[str, Any]
    recipe: Recipe
    seed: int
    out: Path


def cifar10(record: Record, asked: Asked) -> None:
    """Train A0 for small images with three seeds, and count the predictions that folding changes."""
    arch, epochs, seeds = ("repvgg_micro", 1, 1) if asked.tiny else ("repvgg_a0", 200, 3)
    jobs = _jobs(record, asked, arch, arch, {"small_input": True}, replace(RECIPE, epochs=epochs), seeds)
    _refuse([line for seed in range(seeds) for line in _train(record, asked, arch, jobs, seed)])


def ablation(record: Record, asked: Asked) -> None:
    """Train B0 at full depth and half its width with each block of Tables 6 and 7, three seeds of each.

    First seed 0 of each, Table 6's blocks before Table 7's; what is not finished goes on the next time.
    """
    epochs, seeds = (1, 1) if asked.tiny else (60, 3)
    recipe, lost = replace(RECIPE, epochs=epochs), list[str]()
    rows = [("repvgg_b0", row.block, row.top1) for row in TABLE6] + [(row.model, row.block, row.top1) for row in TABLE7]
    variants = {"residual" if arch.endswith("residual") else block: (arch, block, top1) for arch, block, top1 in rows}
    size = {"small_input": True, "width": 0.125 if asked.tiny else 0.5}
    jobs = {
        name: _jobs(record, asked, name, arch, {**size, "block": block}, recipe, seeds)
        for name, (arch, block, _) in variants.items()
    }
    for seed in range(seeds):
        for name, (_, _, top1) in variants.items():
            lost += _train(record, asked, name, jobs[name], seed, paper=top1)
    _refuse(lost)


def _jobs(record: Record, asked: Asked, name: str, arch: str, options: dict[str, Any], recipe: Recipe, seeds: int) -> list[Job]:
    """Return a variant's seeds; other networks or data have other files."""
    asks = json.dumps([record.settings, arch, options, asdict(recipe)], sort_keys=True)
    stem = f"{record.path.stem}-{name}-{hashlib.sha256(asks.encode()).hexdigest()[:8]}"
    return [Job(arch, options, recipe, seed, asked.work / "runs" / f"{stem}-{seed}.json") for seed in range(seeds)]


def _train(record: Record, asked: Asked, name: str, jobs: list[Job], seed: int, **more: Any) -> list[str]:
    """Train one seed, an epoch at least where any time is left; what is not finished goes on the next time.

    Return a line for a process that did not end well; what it did is recorded all the same.
    """
    job = jobs[seed]
    more = {"arch": job.arch, "options": job.options, "recipe": asdict(job.recipe), **more}
    if name not in record.figures and any(each.out.exists() for each in jobs):  # the record was lost, what was trained was not
        record.put(name, _figures(jobs) | more)
    if asked.over or (job.out.exists() and json.loads(job.out.read_text())["finished"]):
        return []
    server = multiprocessing.get_context("forkserver")  # a process of it starts at once: PyTorch is there, and CUDA not yet begun
    server.set_forkserver_preload(["gpu_training"])
    process = server.Process(target=train, args=(job, asked))
    process.start()
    while process.is_alive():
        process.join(SAVING)
        record.put(name, _figures(jobs) | more)  # whoever ends this process finds what there was
    record.put(name, _figures(jobs) | more)
    return [f"{name}, seed {seed}: exit code {process.exitcode}"] if process.exitcode else []


def _figures(jobs: list[Job]) -> dict[str, Any]:
    epochs, runs = jobs[0].recipe.epochs, [json.loads(job.out.read_text()) for job in jobs if job.out.exists()]
    top1 = [run["top1_by_epoch"][-1] for run in runs if run["finished"]]
    mean = sum(top1) / len(top1) if top1 else None
    return {"finished": len(top1) == len(jobs), "epochs": epochs, "n": len(top1), "mean_top1": mean, "runs": runs}


def _refuse(lost: list[str]) -> None:
    if lost:
        raise RuntimeError("; ".join(lost))


def train(job: Job, asked: Asked) -> None:
    """Train one network for an epoch, and for more until the time is over; go on with one that was stopped."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    data = read(asked)
    torch.manual_seed(job.seed)
    model = zoo.create_model(job.arch, num_classes=data.classes, in_chans=data.train.channels, **job.options)
    # CUDA graphs: such small images leave a GPU waiting for Python otherwise.
    compiled = asked.on_cuda and asked.until - time.time() > COMPILING
    stepper = Stepper(model, job.recipe, asked.device, "reduce-overhead" if compiled else "")
    state_file = job.out.with_suffix(".state")
    run: dict[str, Any] = {"seed": job.seed, "top1_by_epoch": [], "finished": False}
    if state_file.exists():
        state = torch.load(state_file, map_location=asked.device, weights_only=True)
        model.load_state_dict(state["model"])
        stepper.optimizer.load_state_dict(state["optimizer"])
        run = json.loads(state["run"])
        write_text(job.out, state["run"])  # it may be older, or was never written
    saved = time.time()
    for epoch in range(len(run["top1_by_epoch"]), job.recipe.epochs):
        _epoch_or_uncompiled(stepper, data, job, epoch)
        last = epoch + 1 == job.recipe.epochs
        labels = _predictions(model, data.held_out, "fp32" if last else job.recipe.precision)
        run["top1_by_epoch"].append(float((labels == data.held_out_labels).float().mean()))
        if last:
            run |= {"finished": True, **_folded(model, data)}
        over = asked.over
        if run["finished"] or over or time.time() - saved > SAVING:
            text, saved = json.dumps(run | {"compiled": stepper.network is not model}), time.time()
            state = {"model": model.state_dict(), "optimizer": stepper.optimizer.state_dict(), "run": text}
            atomically(state_file, partial(torch.save, state))
            write_text(job.out, text)
        if over:
            return


def _epoch_or_uncompiled(stepper: Stepper, data: "Data", job: Job, epoch: int) -> None:
    """Pass over the images once; where that cannot be compiled (there is no C compiler, say) without, from here on."""
    try:
        _epoch(stepper, data, job, epoch)
    except RuntimeError as error:
        if stepper.network is stepper.model:
            raise
        print(f"not compiled: {error}", flush=True)
        stepper.network = stepper.model
        _epoch(stepper, data, job, epoch)


def _epoch(stepper: Stepper, data: "Data", job: Job, epoch: int) -> None:
    """Pass over the images once, shuffled, shifted and mirrored on the device, by seed and epoch."""
    stepper.model.train()
    recipe, train, size = job.recipe, data.train, job.recipe.batch_size
    most, reflected = int(recipe.shift * train.height), recipe.border == "reflected"
    shifts = Shifts(train.count, most, reflected, data.mirror, (job.seed, epoch)).to(train.device)
    draw = torch.Generator().manual_seed(1_000_003 * job.seed + epoch)
    order = torch.randperm(train.count, generator=draw).to(train.device)
    steps = max(1, len(order) // size)
    for i in range(steps):
        images, labels = train.batch(order[i * size : (i + 1) * size], shifts)
        stepper(data.normalised(images), labels, recipe.lr_at((epoch * steps + i) / (recipe.epochs * steps)))


def _folded(model: torch.nn.Module, data: "Data") -> dict[str, Any]:
    """Count how many held-out images both forms label alike, in float32."""
    try:
        deploy = reparameterize(model.eval())
    except ReparamError as error:
        return {"folded": None, "refused": str(error)}
    before, after = _predictions(model, data.held_out), _predictions(deploy, data.held_out)
    return {"folded": {"equal": int((before == after).sum()), "images": len(before)}}


@torch.inference_mode()
def _predictions(model: torch.nn.Module, images: Tensor, precision: str = "fp32") -> Tensor:
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([model(part.contiguous(memory_format=torch.channels_last)).argmax(1) for part in images.split(500)])


# ------------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """The training images, and the held-out ones, normalised [N, C, H, W], with their labels [N], on the device.

    mean, deviation: of the training images, by channel. mirror: not of digits.
    """

    train: Resident
    held_out: Tensor
    held_out_labels: Tensor
    mean: Tensor
    deviation: Tensor
    classes: int
    mirror: bool

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return images whose channels have mean 0 and deviation 1."""
        return (pixels.float() - self.mean) / self.deviation


def read(asked: Asked) -> Data:
    """Put packed files, or any data that repvgg knows, on the device."""
    arrays = _packed(Path(asked.data)) if asked.data.endswith(".npz") else _arrays(asked.data)
    most = (256, 100) if asked.tiny else (None, None)
    pixels, labels = (torch.from_numpy(arrays[name][: most[0]]) for name in ("images", "labels"))
    held_out, held_out_labels = (torch.from_numpy(arrays[f"held_out{name}"][: most[1]]) for name in ("", "_labels"))
    mean = pixels.float().mean((0, 2, 3), keepdim=True)
    deviation = pixels.float().std((0, 2, 3), keepdim=True).clamp(min=1)
    return Data(
        Resident(pixels, labels.long(), asked.device),
        ((held_out.float() - mean) / deviation).to(asked.device),
        held_out_labels.long().to(asked.device),
        mean.to(asked.device),
        deviation.to(asked.device),
        int(arrays["labels"].max()) + 1,
        pixels.shape[1] == 3,
    )


def _arrays(spec: str) -> dict[str, Any]:
    from repvgg.data import open_source

    source, arrays = open_source(spec), {}
    for prefix, split in (("", source.train), ("held_out_", source.val)):
        examples = [split[i] for i in range(len(split))]
        arrays[prefix.rstrip("_") or "images"] = torch.stack([image for image, _ in examples]).numpy()
        arrays[f"{prefix}labels"] = np.array([int(label) for _, label in examples], np.int64)
    return arrays


def _packed(pattern: Path) -> dict[str, Any]:
    files = sorted(pattern.parent.glob(pattern.name))
    parts = [dict(np.load(file)) for file in files]
    if wrong := [file for file, part in zip(files, parts, strict=True) if int(part.pop("parts")) != len(files)]:
        raise ValueError(f"{wrong[0]} is not one of {len(files)} parts: they are to be there all, and no others")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def pack(spec: str, path: Path) -> None:
    """Write the images of a data set, all of one size, into compressed files, and beside them which commit this is."""
    arrays = _arrays(spec)
    count = -(-sum(array.nbytes for array in arrays.values()) // PART)
    for i in range(count):
        part = {name: np.array_split(array, count)[i] for name, array in arrays.items()}
        atomically(file := path.with_stem(f"{path.stem}-{i:02}"), partial(_compress, {"parts": np.array(count), **part}))
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    if commit := this_machine()["commit"]:
        path.with_name("COMMIT").write_text(commit + "\n")


def _compress(arrays: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # of another name NumPy would make its own
        np.savez_compressed(file, **arrays)
