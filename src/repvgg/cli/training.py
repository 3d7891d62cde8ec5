"""Commands that train: train, prune, quantize, ablate."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from repvgg.cli.flags import (
    Data,
    Draw,
    Drawn,
    Model,
    OnDevice,
    OnDeviceLoading,
    Output,
    Printed,
    Settings,
    Shape,
    Shaped,
    Where,
    WhereLoading,
    WithRecipe,
    listed,
    process,
    say,
)
from repvgg.train.recipes import Keeping


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model on images, evaluate it every epoch, keep the best and the last; resume a run that was stopped.

    Example: repvgg train --arch repvgg_a0 --data photos --out runs/photos
    """

    arch: str = ""
    """A model's name (see repvgg info); not needed with --init."""
    init: str = ""
    """A model file, or a name for its pretrained weights, to start from; new classes get a new head. none: new weights,
    even where --recipe auto would take trained ones."""
    data: Data
    out: Path
    """Run folder for models, recipe and metrics."""
    recipe: str = ""
    """auto (chosen for these images and this machine; the default for photos), light, heavy, cifar, finetune, demo, pspnet, camvid;
    or a file (.json). Its fields are the flags below."""
    minutes: float | None = None
    """Minutes for --recipe auto; by default 10."""
    block: str = ""
    """The structure of each layer in training form; by default the model's own. (An unknown one lists them all.)"""
    report: bool = True
    """At the end write a page of the run, run.html, as repvgg report does."""
    shape: Shaped = field(default_factory=Shape)
    draw: Drawn = field(default_factory=Draw)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    keeping: OmitArgPrefixes[Keeping] = field(default_factory=Keeping)
    settings: WithRecipe = field(default_factory=Settings)

    def run(self) -> None:
        from repvgg.api.training import train

        how = {**vars(self.shape), **vars(self.draw), **vars(self.where), **self.settings.changes}
        result = train(
            self.arch,
            self.data,
            self.out,
            recipe=self.recipe,
            init=self.init,
            minutes=self.minutes,
            block=self.block,
            report=self.report,
            keeping=self.keeping,
            log=say,
            **how,
        )
        if process() == 0:
            print(result)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Remove channels from a RepVGG and train the rest; report accuracy, cost and speed before and after.

    In a training form, all branches are pruned together.

    Example: repvgg prune runs/photos/best.safetensors --data photos --keep 0.5 --out runs/pruned
    """

    model: Model
    data: Data
    out: Path
    """Run folder, with the best model in deploy form too (deploy.safetensors), and the figures (pruning.json)."""
    keep: float = 0.5
    """Share of each layer's channels that stay."""
    recipe: str = ""
    """A name or a file, as for train; empty: what suits the data, by SGD; for photos finetune. Its fields are the flags below."""
    engine: str = "eager"
    """Engine that the speeds are measured with, as in repvgg bench."""
    draw: Drawn = field(default_factory=Draw)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)
    keeping: OmitArgPrefixes[Keeping] = field(default_factory=Keeping)
    settings: WithRecipe = field(default_factory=Settings)

    def run(self) -> None:
        from repvgg.api.files import prune
        from repvgg.cli.show_results import show_pruning

        how = {**vars(self.draw), **vars(self.where), **self.settings.changes}
        report = prune(
            self.model,
            self.data,
            self.out,
            self.keep,
            recipe=self.recipe,
            engine=self.engine,
            keeping=self.keeping,
            log=say,
            **how,
        )
        show_pruning(report, self.output.json)


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize to INT8, calibrated on real images; report accuracy before and after, harmful layers, speed.

    It is calibrated on the training split and evaluated on the whole validation split.

    Example: repvgg quantize runs/photos/best.safetensors --data photos --to onnx --out int8
    """

    model: Model
    data: Data
    to: Literal["openvino", "onnx", "native"]
    """Kind of file; native: a model file that knows its ranges, for --engine native --precision int8."""
    out: Path
    """Folder for the file and its report (.json)."""
    images: int = 300
    """Images to calibrate on."""
    bias_correction: Literal["none", "fast", "full"] = "fast"
    """Undo what rounding weights does to a layer's mean."""
    equalise: bool = False
    """Scale channels first, to give weights similar ranges; exact."""
    keep: tuple[int, ...] = ()
    """Numbers of layers to leave in float; 0 -1 for the first and the last."""
    max_drop: float | None = None
    """Largest loss of top-1, as a fraction: leave as many layers in float as that takes."""
    qat_epochs: int = 0
    """QAT epochs: insert batch norms and train with weights and activations rounded."""
    qat_lr: float = 0.001
    """Initial learning rate of QAT."""
    draw: Drawn = field(default_factory=Draw)
    where: OnDevice = field(default_factory=Where)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.api.files import quantize
        from repvgg.cli.show_results import show_quantization
        from repvgg.deploy.quantize import Quantization

        if self.qat_lr != type(self).qat_lr and not self.qat_epochs:
            raise ValueError("--qat-lr is for --qat-epochs: give both, or neither")
        how = Quantization(self.images, self.bias_correction, self.equalise, self.keep, self.max_drop, self.qat_epochs, self.qat_lr)
        report = quantize(self.model, self.data, self.to, self.out, settings=how, log=say, **vars(self.draw), **vars(self.where))
        show_quantization(report, self.output.json)


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Repeat Tables 6 and 7 of the paper on any data: train every variant of a block with every seed and compare them.

    Finished runs are kept and unfinished ones resume, so you can stop and restart it at will. With --ray, a cluster trains
    many at a time.

    Example: repvgg ablate --data cifar10 --arch repvgg_micro --out runs/ablation
    """

    data: Data
    out: Path
    """Folder for a run folder per cell, and for the tables."""
    arch: str = "repvgg_b0"
    """The member that the variants are of."""
    variants: str = ""
    """Several with commas; by default the eleven of Tables 6 and 7. (An unknown one lists them all.)"""
    seeds: int = 3
    """How many, from 0 on. More may follow later."""
    recipe: str = ""
    """A name or a file, as for train; empty: what suits the data, by SGD; for photos light. Its fields are the flags below."""
    limit: int | None = None
    """At most this many images of each split, the same for all variants."""
    ray: str = ""
    """Train as Ray tasks. auto: on the cluster of this machine, or else on this machine alone; or a cluster's address."""
    shape: Shaped = field(default_factory=Shape)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)
    settings: WithRecipe = field(default_factory=Settings)

    def run(self) -> None:
        from repvgg.api.training import settled
        from repvgg.data import open_source
        from repvgg.paper.ablation import ablate
        from repvgg.paper.grid import Grid
        from repvgg.paper.report import keep, show
        from repvgg.paper.result import PaperSettings as How

        recipe = settled(self.recipe, open_source(self.data), "light", self.settings.changes, say)
        device = (replace(self.where, device="") if self.ray else self.where).chosen()  # of this machine; a cluster has its own
        grid = Grid(
            out=self.out,
            data=self.data,
            recipe=recipe,
            arch=self.arch,
            width=self.shape.width,
            small_input=self.shape.small_input,
            limit=self.limit,
            variants=listed(self.variants),
            seeds=self.seeds,
            device=self.where.device if self.ray else device,
            workers=self.where.workers,
        )
        how = How(data=self.data, device=device, out=self.out, log=say)
        result = ablate(grid, how, self.ray)
        keep("ablation", result, how)
        show("ablation", result, how, self.output.json)
