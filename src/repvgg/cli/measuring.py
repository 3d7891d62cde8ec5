"""Commands that measure: bench, bench-data, index, paper."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from repvgg.cli.flags import DATA, OnDevice, OnDeviceLoading, Output, Precision, Printed, Where, WhereLoading, listed, say


@dataclass(frozen=True)
class Timing:
    """The protocol of the timing."""

    threads: int | None = None
    """Threads of the CPU; by default PyTorch's own number."""
    channels_last: bool = True
    """Memory format NHWC for the PyTorch engines."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time models, engines and precisions in turns, with spread and ratios to the first.

    All models are folded before they are timed, comparators too.

    Example: repvgg bench repvgg_a0 resnet18 --engines eager,onnxruntime --batch-size 1,32
    """

    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODELS", help="Names, as in repvgg info; or of timm's networks.")]
    engines: str = "eager"
    """eager, compile, aotinductor, onnxruntime, ncnn, mnn, openvino, native, on CUDA compile-max, cudagraphs; several with commas,
    or all that are installed."""
    precision: str = "fp32"
    """fp32, tf32, bf16, fp16, int16 (native); several with commas."""
    batch_size: str = "32"
    """Images a batch, several with commas; halved, with a note, if memory runs out."""
    rounds: int = 5
    """Rounds, in each of which every candidate has its turn."""
    batches: int = 10
    """Timed batches a turn. (The paper: 50.)"""
    warmup: int = 5
    """Batches before the first round. (The paper: 50.)"""
    form: Literal["deploy", "training", "both", "space_to_batch"] = "deploy"
    """The deploy form, the training form, or both; or the deploy form with dilated convolutions run as plain ones."""
    input_size: int | None = None
    """Height and width; by default each model's own."""
    allow_unfolded: bool = False
    """Time a model that does not fold entirely, and mark it."""
    out: Path | None = None
    """Write the figures as JSON, with the machine."""
    timing: OmitArgPrefixes[Timing] = field(default_factory=Timing)
    where: OnDevice = field(default_factory=Where)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.bench.models import bench, candidates
        from repvgg.cli.show_results import show_reports

        device, sizes = self.where.chosen(), _numbers(self.batch_size)
        forms = ("deploy", "training") if self.form == "both" else (self.form,)
        wanted = candidates(self.models, self.engines.split(","), self.precision.split(","), forms, device, say)
        reports = [
            bench(
                wanted,
                batch_size=size,
                rounds=self.rounds,
                batches=self.batches,
                warmup=self.warmup,
                threads=self.timing.threads,
                channels_last=self.timing.channels_last,
                device=device,
                input_size=(3, self.input_size, self.input_size) if self.input_size is not None else None,
                allow_unfolded=self.allow_unfolded,
                log=say,
            )
            for size in sizes
        ]
        show_reports(reports, self.out, self.output.json)


@dataclass(frozen=True, kw_only=True)
class BenchData:
    """Time loading of training data by stage: reading, decoding, augmenting, collating, to the device.

    Stages are timed in one process each; "batches" is what a training run gets from all its workers.

    Example: repvgg bench-data digits
    """

    data: Annotated[str, Positional, arg(metavar="DATA", help=DATA)]
    recipe: str = ""
    """Recipe whose augmentation is timed; by default what suits the data."""
    images: int = 512
    """Images of the training split that are timed."""
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.bench.data import data_speeds
        from repvgg.cli.show_results import show_speeds
        from repvgg.data import open_source
        from repvgg.train.recipes import get_recipe

        source = open_source(self.data)
        recipe = get_recipe(self.recipe or source.recipe)
        speeds = data_speeds(source, recipe, self.where.workers, self.where.chosen(), self.images)
        show_speeds(speeds, self.output.json)


@dataclass(frozen=True, kw_only=True)
class WriteIndex:
    """Count the images of a stream's shards, once, so that training need not.

    The index is written beside the data, as _index.json, where every machine finds it; for remote data, into the
    cache folder.

    Example: repvgg index wds:shards
    """

    data: Annotated[str, Positional, arg(metavar="DATA", help="wds:SHARDS or hf-stream:NAME_OR_PATH.")]
    workers: int = 0
    """Processes that read."""

    def run(self) -> None:
        from repvgg.data.stream import write_index

        print(write_index(self.data, self.workers, say))


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Show the paper's tables and figures beside this machine's, or all of them on one page.

    Finished speeds are kept in OUT/speeds.json, so that an interrupted run goes on where it was.

    Example: repvgg paper table4 --quick
    """

    part: Annotated[
        str,
        Positional,
        arg(
            metavar="PART",
            help="table1, ..., table8, figure1, ..., figure4, training_vs_deploy, winograd; or all.",
        ),
    ]
    data: str = ""
    """What tables 6 and 7 train on, as for train (without it they show what repvgg ablate --out OUT/ablation has finished); or
    photos with masks for table 8 (without them its models are only timed)."""
    quick: bool = False
    """Minutes instead of tens of minutes: small batches, few rounds, a handful of models; marked so."""
    models: str = ""
    """Models of tables 4, 5 and 8, figure 1 and training_vs_deploy, several with commas; by default all."""
    engine: str = ""
    """An engine's name, or best: each model's fastest that computes what PyTorch does. By default best for tables 4 and 5 and
    figure 1 (eager with --quick), all that are installed for winograd, eager for the rest."""
    weights: str = ""
    """Trained classifiers, whose top-1 on the data tables 4 and 5 compute: model files or names (the paper's own weights), several
    with commas."""
    init_backbone: str = ""
    """Classifiers that table 8 starts from, as the paper does from ImageNet's: model files or names, several with commas, each for
    the networks on its architecture."""
    precision: Precision = "fp32"
    """Precision of weights and activations."""
    batch_size: int | None = None
    """Images a batch; by default 128 on CUDA (as in the paper) and 8 elsewhere."""
    rounds: int | None = None
    """Rounds in which the candidates take turns."""
    out: Path = Path("paper")
    """Folder for JSON, PNG, SVG and, for all, index.html."""
    timing: OmitArgPrefixes[Timing] = field(default_factory=Timing)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.paper.report import paper
        from repvgg.paper.result import PaperSettings

        settings = PaperSettings(
            data=self.data,
            workers=self.where.workers,
            models=listed(self.models),
            engine=self.engine,
            weights=listed(self.weights),
            init_backbone=listed(self.init_backbone),
            precision=self.precision,
            batch_size=self.batch_size,
            rounds=self.rounds,
            threads=self.timing.threads,
            channels_last=self.timing.channels_last,
            device=self.where.chosen(),
            quick=self.quick,
            out=self.out,
            log=say,
        )
        paper(self.part, settings, self.output.json)


def _numbers(words: str) -> list[int]:
    """Return "1,32" as numbers. Raises ValueError for anything else."""
    if not all(word.strip().isdigit() for word in words.split(",")):
        raise ValueError(f"{words!r}: numbers with commas between them are needed, such as 1,32")
    return [int(word) for word in words.split(",")]
