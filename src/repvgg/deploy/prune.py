"""Pruning: whole channels of a RepVGG, in either form; then training, and what it cost and gained.

    small = pruned(model, images, keep=0.5)      # a narrower network of the same form, not trained on yet

Between two layers of a plain network there is nothing but channels: what makes one and what reads it go together, and no shortcut
holds it in place (section 3.1 of the paper). In training form all branches of a block lose the same channels, and layers that an
identity connects lose them alike.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.data import Source
from repvgg.deploy import engines
from repvgg.deploy.load import load_engine
from repvgg.deploy.parity import folded
from repvgg.deploy.speedup import Speedup, speedup
from repvgg.deploy.surgery import insert_bn
from repvgg.disk import Log
from repvgg.fold.algebra import LinearMap, ReparamError
from repvgg.fold.as_linear import CONVOLUTIONS, as_linear
from repvgg.fold.guards import inside, refuse_train_mode
from repvgg.measure.costs import Cost, cost
from repvgg.measure.machine import write_record
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.models.repvgg import Layer, RepVGG, Residual, is_deploy_form
from repvgg.train.evaluate import Accuracy, batches, check_fit, evaluate_model
from repvgg.train.loop import KEEPING, train
from repvgg.train.recipes import Keeping, Recipe

IMAGES = 128  # that channels are judged by
BATCH = 32  # of the speeds


@torch.no_grad()
def pruned(model: nn.Module, images: Tensor, keep: float) -> nn.Module:
    """Return a copy with the share `keep` of every layer's channels, those that matter most; in eval mode, in the form of `model`.

    A channel matters as much as it brings to what reads it: its root mean square over `images` [N, C, H, W], times the norm of the
    folded weights that read it. Of grouped convolutions each group keeps the same number. Raises ValueError for a share that is
    not between 0 and 1, `ReparamError` for a model that is no RepVGG in eval mode, or has parts that cannot be cut.
    """
    if not 0 < keep < 1:
        raise ValueError(f"--keep {keep}: the share of the channels that stay, above 0 and below 1")
    refuse_train_mode(model)
    manifest = zoo.manifest_of(model)
    if not isinstance(model, RepVGG) or any(isinstance(module, Residual) for module in model.modules()):
        raise ReparamError(f"only a RepVGG can be pruned, not {(manifest.arch or {}).get('name', type(model).__name__)}")
    layers = _layers(model)
    if any(list(layer.se.parameters()) for layer in layers.values()):
        raise ReparamError("a network with squeeze-excite cannot be pruned: its gates tie the channels of a layer together")
    maps = []
    for path, layer in layers.items():
        with inside(path):
            maps.append(as_linear(layer.block))
    kept = _kept(maps, _importance(model, maps, images), keep, tied=not is_deploy_form(model))
    arch = {**(manifest.arch or {}), "widths": [len(channels) for channels in kept]}
    small = zoo.create_model(**arch, deploy=is_deploy_form(model)).to(next(model.parameters()).dtype)
    tensors = {"head.weight": model.head.weight[:, kept[-1]], "head.bias": model.head.bias}
    into = torch.arange(maps[0].in_channels)
    for (path, layer), out in zip(layers.items(), kept, strict=True):
        with inside(path):
            tensors.update(_cut(layer, path, into, out))
        into = out
    try:
        small.load_state_dict(tensors)
    except RuntimeError:
        raise ReparamError(f"--keep {keep}: a block would have other branches than before: fold the model first") from None
    zoo.remember(small, replace(manifest, arch=arch, layers=None))
    return small.eval()


def _layers(model: RepVGG) -> dict[str, Layer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Layer)}


def _importance(model: RepVGG, maps: list[LinearMap], images: Tensor) -> list[Tensor]:
    """Return how much every layer's channels matter, float64, the mean being 1."""
    model = copy.deepcopy(model)  # which will have hooks
    sizes: list[Tensor] = []
    for layer in _layers(model).values():
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.double().square().mean((0, 2, 3)).sqrt()))
    model(images.to(next(model.parameters())))
    readers = [m.kernel.view(m.groups, -1, *m.kernel.shape[1:]).square().sum((1, 3, 4)).flatten().sqrt() for m in maps[1:]]
    readers.append(model.head.weight.double().norm(dim=0))
    scores = [size * reader for size, reader in zip(sizes, readers, strict=True)]
    return [score / score.mean().clamp(min=torch.finfo(score.dtype).tiny) for score in scores]


def _kept(maps: list[LinearMap], importance: list[Tensor], keep: float, tied: bool) -> list[Tensor]:
    """Return the numbers of every layer's channels that stay, in order. tied: layers that keep the shape of what goes in decide
    together with the layer before."""
    groups = max(m.groups for m in maps)
    together: list[list[int]] = []
    for i, m in enumerate(maps):
        if tied and i and m.in_channels == m.out_channels and m.stride == (1, 1):
            together[-1].append(i)
        else:
            together.append([i])
    kept = []
    for some in together:
        score = sum(importance[i] for i in some).view(groups, -1)  # type: ignore[union-attr]
        best = score.topk(max(1, round(keep * score.shape[1]))).indices.sort().values
        kept += [(best + torch.arange(groups, device=best.device)[:, None] * score.shape[1]).flatten()] * len(some)
    return kept


def _cut(layer: Layer, path: str, into: Tensor, out: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer whose input has lost all channels but `into`, and its output all but `out`."""
    for name, module in layer.named_modules(prefix=path):
        if isinstance(module, nn.Conv2d) and type(module) not in CONVOLUTIONS:
            raise ReparamError("computes its kernel from other parameters, which cannot be cut: fold the model first", name)
        for part, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            cut = tensor[out] if tensor.dim() else tensor
            if tensor.dim() == 4:
                cut = _read(cut, module.groups, into)  # type: ignore[arg-type]
            yield f"{name}.{part}", cut


def _read(weight: Tensor, groups: int, into: Tensor) -> Tensor:
    """The columns `into` of a kernel [out, in / groups, kh, kw]; each group has as many of its own."""
    rows, columns = weight.chunk(groups), into.view(groups, -1) % weight.shape[1]
    return torch.cat([row[:, column] for row, column in zip(rows, columns, strict=True)])


# ----------------------------------------------------------------------------------------------- with training and figures


@dataclass(frozen=True)
class PruningReport:
    """Before, at once after, and after training: accuracy on the validation split; and in deploy form, cost and speed."""

    path: Path
    before: Accuracy
    cut: Accuracy
    after: Accuracy
    costs: tuple[Cost, Cost]
    speedup: Speedup
    engine: str
    keep: float

    def __str__(self) -> str:
        large, small = self.costs
        return (
            f"{self.keep:.0%} of the channels: top-1 {self.before.top1:.2%} before, {self.cut.top1:.2%} at once after, then "
            f"{self.after.top1:.2%}\n{large.macs / small.macs:.2f} times fewer MACs, {self.speedup.ratio} the speed"
        )

    def to_json(self) -> dict[str, Any]:
        accuracies = (("before", self.before), ("cut", self.cut), ("after", self.after))
        return {
            "keep": self.keep,
            "accuracy": {name: {**a.figures, "images": a.images} for name, a in accuracies},
            "params": [c.params for c in self.costs],
            "macs": [c.macs for c in self.costs],
            "engine": self.engine,
            "speed": self.speedup.to_json(),
        }


def prune(
    model: nn.Module,
    source: Source,
    out: str | Path,
    keep: float,
    recipe: Recipe,
    *,
    engine: str = "eager",
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    keeping: Keeping = KEEPING,
    log: Log = print,
) -> PruningReport:
    """Prune a model of ours, train it on a source, and measure both. `out` becomes a run folder (see train/loop.py), with the best
    model in deploy form as deploy.safetensors and the figures as pruning.json.

    A deploy form gets batch norms to train with, and its training form is plain ones. Called again, it goes on where it was
    stopped. engine: that the speeds are of. Raises what `pruned`, `train` and `load_engine` do.
    """
    engines.check(engine, "fp32")
    check_fit(zoo.manifest_of(model), source)
    manifest = replace(zoo.manifest_of(model), classes=source.classes)  # as many, whatever they are called
    images = torch.cat([x for x, _ in batches(source.limited(IMAGES).train, manifest.preprocessing, BATCH)])
    small = pruned(model, images, keep)
    if is_deploy_form(small):
        log("in deploy form: batch norms are inserted to train with")
        small = insert_bn(small, images)
    zoo.remember(small, replace(manifest, arch=zoo.manifest_of(small).arch, layers=None))
    accuracy = partial(evaluate_model, source=source, device=device)
    deploy = folded(model)
    before, cut = accuracy(deploy), accuracy(folded(small))
    log(f"top-1 {before.top1:.2%} before, {cut.top1:.2%} with {keep:.0%} of the channels")
    train("", source, recipe, out, init=small, seed=seed, device=device, workers=workers, keeping=keeping, log=log)
    best, path = folded(load(Path(out) / "best.safetensors")), Path(out) / "deploy.safetensors"
    save(best, path)
    after = accuracy(best)
    size = manifest.preprocessing.input_size
    costs = cost(deploy, size), cost(best, size)
    on = device if engines.precisions(engine, device) else "cpu"  # the engine's own, where it has none of that kind
    runners = [load_engine(network.cpu(), engine, batch_size=BATCH, device=on, log=log) for network in (deploy, best)]
    report = PruningReport(path, before, cut, after, costs, speedup(*runners), engine, keep)
    write_record(Path(out) / "pruning.json", report.to_json())
    return report
