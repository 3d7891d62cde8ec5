"""The training loop: SGD on a recipe, evaluated every epoch, with the best and the last model kept.

    train("repvgg_a0", open_source("digits"), get_recipe("demo"), out="runs/digits")

A run folder holds best.safetensors and last.safetensors (training form), recipe.json, and metrics.jsonl: a line every
`LOG_EVERY` steps and one for each evaluation; and in the end summary.json, with the machine and the time.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg import record, zoo
from repvgg.data import Source
from repvgg.data.transforms import Transformed, load, normalise
from repvgg.files import FileError, atomically
from repvgg.train.augment import train_transform
from repvgg.train.evaluate import Accuracy, batches, evaluate
from repvgg.train.progress import Progress
from repvgg.train.recipes import Recipe

LOG_EVERY = 20  # steps


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: the model in training form, eval mode; its last and its best accuracy; and the time it took."""

    model: nn.Module
    last: Accuracy
    best: Accuracy
    seconds: float
    history: list[dict[str, Any]]


def train(
    arch: str,
    source: Source,
    recipe: Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    log: Any = print,
    **model_options: Any,
) -> Run:
    """Train a new model of `arch` on a source, into the folder `out`.

    model_options: further arguments of `create_model` (width, block, ...); `small_input` is on for inputs of at most 64 pixels
    unless it is given. Raises ValueError before any work if the settings do not fit, FloatingPointError if the loss is no number.
    """
    if len(source.classes) < 2:
        raise ValueError(f"{source.name}: has one class, {source.classes[0]!r}; there is nothing to tell apart")
    torch.manual_seed(seed)
    model = new_model(arch, source, log=log, **model_options).to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = Transformed(source.train, train_transform(recipe, source.preprocessing), seed)
    batch_size = min(recipe.batch_size, len(images))
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(
        parameter_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov
    )
    out = _run_folder(Path(out))
    atomically(out / "recipe.json", lambda path: path.write_text(json.dumps(asdict(recipe), indent=2) + "\n"))
    network: Any = torch.compile(model, dynamic=False) if recipe.compile else model
    metrics = Metrics(out / "metrics.jsonl")
    (out / "summary.json").unlink(missing_ok=True)  # of an earlier run
    started, best, last = time.perf_counter(), None, None
    with Progress(recipe.epochs, steps, batch_size, log) as progress:
        for epoch in range(recipe.epochs):
            model.train()
            for step, (x, y) in enumerate(_epoch(images, epoch, seed, batch_size, steps, workers), epoch * steps):
                lr = recipe.lr_at(step / (recipe.epochs * steps))
                x = normalise(x.to(device, non_blocking=True), source.preprocessing)
                loss, correct = _step(network, optimizer, recipe, lr, x, y.to(device), len(source.classes))
                progress.step(epoch, loss, correct / len(y), lr)
                if (step + 1) % LOG_EVERY == 0:
                    metrics.write(step=step + 1, epoch=epoch, **progress.averages())
            _check_state(model)
            last = _evaluate(model, network, source, batch_size, workers, device, recipe)
            progress.evaluated(epoch, last)
            metrics.write(step=(epoch + 1) * steps, epoch=epoch, val_loss=last.loss, val_top1=last.top1, val_top5=last.top5)
            remember = {"data": source.name, "epoch": epoch + 1, "val_top1": last.top1, "seed": seed, "recipe": asdict(recipe)}
            if best is None or last.top1 > best.top1:
                best = last
                _save(model, out / "best.safetensors", source, remember)
            _save(model, out / "last.safetensors", source, remember)
    assert last is not None
    assert best is not None
    seconds = time.perf_counter() - started
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    summary = {"command": command, "seconds": seconds, "best_top1": best.top1, "last_top1": last.top1}
    record.write(out / "summary.json", {**summary, "arch": arch, "data": source.name, "seed": seed})
    return Run(model.eval(), last, best, seconds, metrics.lines)


def new_model(arch: str, source: Source, log: Any = print, **options: Any) -> nn.Module:
    """`create_model` for this source: its classes, its channels, and `small_input` for small images."""
    channels, height, width = source.preprocessing.input_size
    if "small_input" not in options and max(height, width) <= 64 and zoo.is_family(arch):
        log(f"images of {height} x {width} pixels: small_input is on (stem and first stage at stride 1)")
        options["small_input"] = True
    model = zoo.create_model(arch, num_classes=len(source.classes), in_chans=channels, **options)
    zoo.remember(model, replace(zoo.manifest_of(model), classes=source.classes, preprocessing=source.preprocessing))
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on kernels (more than one dimension) alone: not on biases, nor on batch norms' weights (section 4.1)."""
    kernels = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _step(
    network: Any, optimizer: torch.optim.Optimizer, recipe: Recipe, lr: float, x: Tensor, y: Tensor, num_classes: int
) -> tuple[float, float]:
    """One step of SGD; the loss, and how many images were recognised."""
    target = y
    if recipe.mixup:
        from torchvision.transforms import v2

        x, target = v2.MixUp(alpha=recipe.mixup, num_classes=num_classes)(x, y)
    if recipe.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with _autocast(recipe, x.device.type):
        logits = network(x)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=recipe.label_smoothing)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _diverged(f"the loss is {value}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value, float((logits.argmax(1) == y).sum())


def _epoch(
    images: Transformed, epoch: int, seed: int, batch_size: int, steps: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches; the order is a function of seed and epoch. The last incomplete batch is left out."""
    images.epoch.fill_(epoch)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
    return load(images, batch_size, workers, order[: steps * batch_size])


def _evaluate(
    model: nn.Module, network: Any, source: Source, batch_size: int, workers: int, device: str, recipe: Recipe
) -> Accuracy:
    model.eval()

    def forward(x: Tensor) -> Tensor:
        if recipe.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with _autocast(recipe, x.device.type):
            logits: Tensor = network(x)
        return logits

    data = batches(source.val, source.preprocessing, batch_size, workers, device)
    return evaluate(forward, data, len(source.classes))


def _autocast(recipe: Recipe, device: str) -> Any:
    return torch.autocast(device, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()


def _diverged(how: str) -> FloatingPointError:
    return FloatingPointError(f"{how}: training diverged, lower --lr. Models saved before are intact")


def _check_state(model: nn.Module) -> None:
    """No model is saved that could not be loaded. Raises FloatingPointError for numbers that are not finite.

    A channel that has been constant for a thousand steps has a running variance of 0.9^1000, which is zero to the last bit, and
    a zero in a file is a sign of damage; the smallest positive number in its place changes no output, because eps is added.
    """
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise _diverged(f"{name} holds NaN or Inf")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.clamp_(min=torch.finfo(module.running_var.dtype).tiny)


def _run_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out}: cannot be a run folder ({error.strerror})") from None
    return out


def _save(model: nn.Module, path: Path, source: Source, remember: dict[str, Any]) -> None:
    zoo.save(model, path, classes=source.classes, preprocessing=source.preprocessing, training=remember)


class Metrics:
    """metrics.jsonl, a line at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        path.write_text("")

    def write(self, **values: Any) -> None:
        self.lines.append(values)
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
