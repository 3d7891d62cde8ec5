"""Pruning: whole channels of a RepVGG, in either form; then training, and what it cost and gained.

    small = pruned(model, images, keep=0.5)      # a narrower network of the same form, not trained on yet

Between two layers of a plain network there is nothing but channels: what makes one and what reads it go together, and no shortcut
holds it in place (section 3.1 of the paper). In training form all branches of a block lose the same channels, and layers that an
identity connects lose them alike; so do all residual blocks of a stage (`repvgg_b0_residual`).
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
from repvgg.data.transforms import BadImages
from repvgg.deploy import engines
from repvgg.deploy.load import load_engine
from repvgg.deploy.parity import folded
from repvgg.deploy.speedup import Speedup, speedup
from repvgg.deploy.surgery import insert_bn
from repvgg.disk import Log, make_folder
from repvgg.fold.algebra import LinearMap, ReparamError
from repvgg.fold.as_linear import CONVOLUTIONS, Branches, as_linear
from repvgg.fold.guards import inside, refuse_train_mode
from repvgg.measure.costs import Cost, cost
from repvgg.measure.machine import write_record
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.models.repvgg import Layer, RepVGG, Residual, is_deploy_form
from repvgg.train.evaluate import Accuracy, batches, evaluate_model
from repvgg.train.loop import KEEPING, train
from repvgg.train.recipes import Keeping, Recipe
from repvgg.train.tasks import CLASSIFICATION

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
    if not isinstance(model, RepVGG):
        raise ReparamError(f"only a RepVGG can be pruned, not {(manifest.arch or {}).get('name', type(model).__name__)}")
    if any(list(layer.se.parameters()) for layer in model.modules() if isinstance(layer, Layer)):
        raise ReparamError("a network with squeeze-excite cannot be pruned: its gates tie the channels of a layer together")
    convolutions, sets = _convolutions(model)
    groups = max(c.map.groups for c in convolutions)
    kept = [_best(score, keep, groups) for score in _importance(model, convolutions, sets, images)]
    kept.insert(0, torch.arange(convolutions[0].map.in_channels))
    arch = {**(manifest.arch or {}), "widths": [len(kept[sets[c.makes]]) for c in convolutions if not c.path.endswith(".shortcut")]}
    small = zoo.create_model(**arch, deploy=is_deploy_form(model)).to(next(model.parameters()).dtype)
    tensors = {"head.weight": model.head.weight[:, kept[sets[convolutions[-1].makes]]], "head.bias": model.head.bias}
    for c in convolutions:
        with inside(c.path):
            tensors.update(_cut(model.get_submodule(c.path), c.path, kept[sets[c.reads]], kept[sets[c.makes]]))
    try:
        small.load_state_dict(tensors)
    except RuntimeError:
        raise ReparamError(f"--keep {keep}: a block would have other branches than before: fold the model first") from None
    zoo.remember(small, replace(manifest, arch=arch, layers=None))
    return small.eval()


@dataclass(frozen=True)
class _Convolution:
    """Name what folds to one convolution: a block, or the shortcut of a residual block.

    reads, makes: paths of the modules whose output it reads ("" for the image) and makes, alone or by an addition.
    """

    path: str
    map: LinearMap
    reads: str
    makes: str


def _convolutions(model: RepVGG) -> tuple[list[_Convolution], dict[str, int]]:
    """Return a network's convolutions, and for each place between them the number of its set of channels, the image's being 0.

    Places that have a set in common lose the same channels: an addition or an identity holds them together.
    """
    found: list[_Convolution] = []
    sets = {"": 0}

    def add(path: str, reads: str, makes: str) -> str:
        block = model.get_submodule(path)
        with inside(path):
            m = as_linear(block)
        found.append(_Convolution(path, m, reads, makes))
        tied = reads and _may_hold_an_identity(block) and m.in_channels == m.out_channels and m.stride == (1, 1)
        sets.setdefault(makes, sets[reads] if tied else max(sets.values()) + 1)
        return makes

    place = add("stem.block", "", "stem")
    for path, module in model.stages.named_modules(prefix="stages"):
        if isinstance(module, Residual):
            if isinstance(module.shortcut, nn.Identity):
                sets[path] = sets[place]
            inner = add(f"{path}.layer.block", place, f"{path}.layer")
            add(f"{path}.block", inner, path)
            if not isinstance(module.shortcut, nn.Identity):
                add(f"{path}.shortcut", place, path)
            place = path
        elif isinstance(module, Layer) and not path.endswith(".layer"):
            place = add(f"{path}.block", place, path)
    return found, sets


def _may_hold_an_identity(block: nn.Module) -> bool:
    if isinstance(block, Branches):
        return any(isinstance(branch, nn.BatchNorm2d | nn.Identity) for branch in block.children())
    return not isinstance(block, nn.Conv2d)


def _importance(model: nn.Module, convolutions: list[_Convolution], sets: dict[str, int], images: Tensor) -> list[Tensor]:
    """Return how much the channels of every set but the image's matter, float64; all places that have it count alike."""
    model = copy.deepcopy(model)  # which will have hooks
    sizes: dict[str, Tensor] = {}

    def measure(place: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes[place] = output.double().square().mean((0, 2, 3)).sqrt()

    read: dict[str, Tensor] = {convolutions[-1].makes: model.get_submodule("head").weight.double().square().sum(0)}  # type: ignore
    for c in convolutions:
        power = c.map.kernel.view(c.map.groups, -1, *c.map.kernel.shape[1:]).square().sum((1, 3, 4)).flatten()
        read[c.reads] = read.get(c.reads, 0) + power
    for place in dict.fromkeys(c.makes for c in convolutions):
        model.get_submodule(place).register_forward_hook(partial(measure, place))
    model(images.to(next(model.parameters())))
    scores: dict[int, Tensor] = {}
    for place, size in sizes.items():
        score = size * read[place].sqrt()
        score = score / score.mean().clamp(min=torch.finfo(score.dtype).tiny)
        scores[sets[place]] = scores.get(sets[place], 0) + score
    return [scores[number] for number in sorted(scores)]


def _best(score: Tensor, keep: float, groups: int) -> Tensor:
    """Return the numbers of the channels that stay, in order; of each group as many."""
    each = score.view(groups, -1)
    best = each.topk(max(1, round(keep * each.shape[1]))).indices.sort().values
    return (best + torch.arange(groups, device=best.device)[:, None] * each.shape[1]).flatten()


def _cut(block: nn.Module, path: str, into: Tensor, out: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a block whose input has lost all channels but `into`, and its output all but `out`."""
    for name, module in block.named_modules(prefix=path):
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
    if source.masks:
        raise ValueError(f"{source.name} has masks, and only classifiers are pruned")
    CLASSIFICATION.check(model, source)
    bad = None
    if keeping.on_bad_image == "skip":
        make_folder(out, "a run folder")
        bad = BadImages(Path(out) / "bad_images.txt", replace=False)
    manifest = replace(zoo.manifest_of(model), classes=source.classes)  # as many, whatever they are called
    judged_by = batches(source.limited(IMAGES).train, manifest.preprocessing, BATCH, bad=bad)
    images = torch.cat([x[labels >= 0] for x, labels in judged_by])
    small = pruned(model, images, keep)
    if is_deploy_form(small):
        log("in deploy form: batch norms are inserted to train with")
        small = insert_bn(small, images)
    zoo.remember(small, replace(manifest, arch=zoo.manifest_of(small).arch, layers=None))
    accuracy = partial(evaluate_model, source=source, device=device, bad=bad)
    deploy = folded(model)
    before, cut = accuracy(deploy), accuracy(folded(small))
    log(f"top-1 {before.top1:.2%} before, {cut.top1:.2%} with {keep:.0%} of the channels")
    train("", source, recipe, out, init=small, seed=seed, device=device, workers=workers, keeping=keeping, log=log)
    best, path = folded(load(Path(out) / "best.safetensors")), Path(out) / "deploy.safetensors"
    save(best, path)
    after = accuracy(best)
    size = manifest.preprocessing.input_size
    costs = cost(deploy, size), cost(best, size)
    on = device if engines.precisions(engine, device) else "cpu"
    if on != device:
        log(f"the engine {engine} knows no {device}: the speeds are of the CPU")
    runners = [load_engine(network.cpu(), engine, batch_size=BATCH, device=on, log=log) for network in (deploy, best)]
    report = PruningReport(path, before, cut, after, costs, speedup(*runners), engine, keep)
    write_record(Path(out) / "pruning.json", report.to_json(), device)
    return report
