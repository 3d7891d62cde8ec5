"""Models, engines and precisions timed side by side.

    report = bench([Candidate("repvgg_a0"), Candidate("resnet18")], batch_size=32)
    print(report.rows[1].ratio)

The paper's protocol (section 4.1): full precision, batch 128, 50 batches of warm-up, 50 timed, conv and BN of *all* models folded.
Here the timed batches are spread over rounds in which the candidates take turns.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.bench.memory import fitting, held, peak
from repvgg.deploy import engines, from_timm
from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.space_to_batch import space_to_batch
from repvgg.disk import Log
from repvgg.fold.guards import copied
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.costs import Cost, cost
from repvgg.measure.machine import this_machine
from repvgg.measure.timing import Ratio, Times, interleave, ratio, synchroniser
from repvgg.models import zoo
from repvgg.models.baselines import timm_preprocessing
from repvgg.models.names import PSPNETS


@dataclass(frozen=True)
class Candidate:
    """A network, how it is run, and in which precision. form: "deploy" (folded), "space_to_batch" (folded, dilated convolutions run
    as plain ones) or "training" (as it trains); the last two are marked as such. block: as `create_model` takes it."""

    model: str
    engine: str = "eager"
    precision: str = "fp32"
    form: str = "deploy"
    block: str = "repvgg"

    @property
    def name(self) -> str:
        unusual = [f"{self.block} blocks"] * (self.block != "repvgg")
        unusual += {"training": ["training form"], "space_to_batch": ["by space-to-batch"]}.get(self.form, [])
        return " ".join((self.model, self.engine, self.precision, *unusual))


def candidates(
    models: Sequence[str],
    names: Sequence[str],
    precisions: Sequence[str],
    forms: Sequence[str] = ("deploy",),
    device: str = "cpu",
    log: Log = print,
) -> list[Candidate]:
    """Return every combination of models, engines (`names`; "all": those that are installed), precisions and forms.

    Pairs of engine and precision that do not exist are left out, with a word. Raises ValueError where an engine is unknown or
    missing, or nothing is left of it.
    """
    if list(names) == ["all"]:
        names = list(dict.fromkeys(name for precision in precisions for name in engines.installed(precision, device, log)))
    pairs = []
    for engine in names:
        has = engines.precisions(engine, device)
        if not set(precisions) & set(has):
            engines.check(engine, precisions[0], device)
        pairs += [(engine, precision) for precision in precisions if precision in has]
        for precision in precisions:
            if precision not in has:
                log(f"{engine} has no {precision} on {device}: left out")
    return [Candidate(model, *pair, form) for model in models for pair in pairs for form in forms]


@dataclass(frozen=True)
class Row:
    """One candidate's figures. ratio: its speed over the reference's. memory_bytes: growth of the process (CPU) or the allocator's
    peak (CUDA) from building and running it. load_seconds: from the folded model to its first logits. error: of the logits,
    relative to the largest, against PyTorch in float64. left_unfolded: batch norms that could not be folded. cost: of one image,
    counted."""

    candidate: Candidate
    batch_size: int
    input_size: tuple[int, int, int]
    times: Times
    ratio: Ratio
    memory_bytes: int
    load_seconds: float
    error: float
    left_unfolded: int
    cost: Cost

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.times.median

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of images a second over rounds."""
        low, high = self.times.quartiles
        return self.batch_size / high, self.batch_size / low


@dataclass(frozen=True)
class BenchReport:
    """Rows in the order of the candidates; all ratios are to `reference`."""

    rows: list[Row]
    reference: Candidate
    rounds: int
    batches: int
    device: str

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": asdict(self.reference),
            "rounds": self.rounds,
            "batches_a_round": self.batches,
            "rows": [
                {
                    **asdict(row.candidate),
                    "batch_size": row.batch_size,
                    "input_size": row.input_size,
                    "images_per_second": row.images_per_second,
                    "quartiles": row.spread,
                    "seconds_per_batch_by_round": row.times.by_round,
                    "ratio": asdict(row.ratio),
                    "memory_bytes": row.memory_bytes,
                    "load_seconds": row.load_seconds,
                    "max_rel_err": row.error if math.isfinite(row.error) else None,
                    "left_unfolded": row.left_unfolded,
                    "params": row.cost.params,
                    "macs": row.cost.macs,
                    "winograd_muls": row.cost.winograd_muls,
                }
                for row in self.rows
            ],
            "machine": this_machine(self.device),
        }


@dataclass(frozen=True)
class _Ready:
    engine: Engine
    images: Any
    batch_size: int
    memory_bytes: int
    load_seconds: float
    error: float
    left_unfolded: int
    cost: Cost


@dataclass(frozen=True)
class Prepared:
    """A network and all that is known of it before an engine runs it. images: two; logits: theirs in float64."""

    model: nn.Module
    left_unfolded: int
    cost: Cost
    images: Tensor
    logits: Tensor


@torch.no_grad()
def prepared(candidate: Candidate, input_size: tuple[int, int, int], allow_unfolded: bool = False, device: str = "cpu") -> Prepared:
    """Build, fold and count a candidate's network; its engine and precision do not matter here. Raises what `network` raises.

    device: a CUDA device runs it in float64 as well; all else is the processor's.
    """
    model, left = network(candidate, allow_unfolded)
    images = torch.randn(2, *input_size)
    on = device if torch.device(device).type == "cuda" else "cpu"  # others have no float64
    exact = copied(model).to(on, torch.float64)(images.to(on, torch.float64))
    return Prepared(model, left, cost(model, input_size), images, exact.cpu())


Prepare = Callable[[Candidate, tuple[int, int, int], bool, str], Prepared]


def bench(
    candidates: Sequence[Candidate],
    *,
    batch_size: int = 128,
    rounds: int = 5,
    batches: int = 10,
    warmup: int = 5,
    threads: int | None = None,
    channels_last: bool = True,
    device: str = "cpu",
    input_size: tuple[int, int, int] | None = None,
    allow_unfolded: bool = False,
    log: Log = print,
    progress: Log | None = None,
    prepare: Prepare = prepared,
) -> BenchReport:
    """Time the candidates, taking turns; the first is the reference.

    An engine that cannot run a model is left out of it, with a word, if another one can. input_size: of all, or None for each
    model's own. Where memory runs out a candidate's batch is halved, with a word. log: told what one must know; progress: told
    where the work stands, by default `log` too. prepare: `prepared`, or a cache of it for several calls with the same networks.

    Raises ValueError for unknown models and engines (before anything runs), for a model that no engine runs, and for one that
    does not fold, unless allow_unfolded.
    """
    if min(batch_size, rounds, batches) < 1 or not candidates:
        raise ValueError("at least one model, one image a batch, one batch a round and one round are needed")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: at least 1")
    if input_size is not None and min(input_size) < 1:
        raise ValueError(f"--input-size {input_size[-1]}: at least 1")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no CUDA device here")
    candidates = list(dict.fromkeys(replace(c, model=from_timm.resolve(c.model)) for c in candidates))
    for c in candidates:
        engines.check(c.engine, c.precision, device)
    threads = threads or torch.get_num_threads()  # the same number for every engine
    torch.set_num_threads(threads)
    progress = progress or log
    options = Options(batch_size=batch_size, threads=threads, channels_last=channels_last, device=device)
    sizes = {c: input_size or _input_size(c.model) for c in candidates}
    ready, failed = {}, dict[Candidate, ValueError]()
    for c in candidates:
        progress(f"building {c.name}")
        try:
            ready[c] = _ready(c, replace(options, input_size=sizes[c], precision=c.precision), allow_unfolded, log, prepare)
        except ValueError as error:
            failed[c] = error
    for c, why in failed.items():
        if not any(other.model == c.model for other in ready):
            raise why
        log(f"left out: {c.name} ({why})")
    times = interleave(
        {c.name: partial(r.engine.run, r.images) for c, r in ready.items()},
        rounds=rounds,
        batches=batches,
        warmup=warmup,
        synchronise=synchroniser(device),
        progress=lambda done: progress(f"round {done}/{rounds}"),
    )
    per_image = {c: Times([[s / r.batch_size for s in turn] for turn in times[c.name].rounds]) for c, r in ready.items()}
    first = next(iter(ready))
    rows = [
        Row(
            c,
            r.batch_size,
            sizes[c],
            times[c.name],
            ratio(per_image[first], per_image[c]),
            r.memory_bytes,
            r.load_seconds,
            r.error,
            r.left_unfolded,
            r.cost,
        )
        for c, r in ready.items()
    ]
    return BenchReport(rows, first, rounds, batches, device)


def network(candidate: Candidate, allow_unfolded: bool = False) -> tuple[nn.Module, int]:
    """Return the candidate's network with random weights, in its form, eval mode; and how many of its batch norms are left."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if candidate.block == "repvgg" else {"block": candidate.block}
    if candidate.model in PSPNETS:
        options["num_classes"] = 19  # Cityscapes', as in Table 8
    if not candidate.model.startswith(from_timm.PREFIX):
        model = randomise_norms(zoo.create_model(candidate.model, **options))
    elif options:
        raise ValueError(f"{candidate.model}: other blocks are for our own networks")
    else:
        model = from_timm.create(candidate.model.removeprefix(from_timm.PREFIX), log=str)
        model = randomise_norms(model, (4, *timm_preprocessing(model).input_size))
    if candidate.form == "training":
        return model, 0
    folded = reparameterize(model)
    left = len(folded.fold_report.left)  # type: ignore[union-attr, arg-type]
    if left and not allow_unfolded:
        raise ValueError(f"{candidate.model}: {left} batch norms cannot be folded; --allow-unfolded times it so, and marks it")
    return space_to_batch(folded) if candidate.form == "space_to_batch" else folded, left


def _input_size(model: str) -> tuple[int, int, int]:
    """Return the size of images that a network is made for."""
    if not model.startswith(from_timm.PREFIX):
        return zoo.default_preprocessing({"name": model, "in_chans": 3}).input_size
    with torch.device("meta"):
        return timm_preprocessing(from_timm.create(model.removeprefix(from_timm.PREFIX), log=str)).input_size


@torch.no_grad()
def randomise_norms(model: nn.Module, shape: tuple[int, ...] = (4, 3, 64, 64)) -> nn.Module:
    """Return `model` in eval mode, its batch norms as training might leave them: random affine parts, and the statistics of noise.

    Fresh ones are no stand-in: timm's ResNets begin with zeros in the last of each block, and hardware multiplies zeros with less
    power, so faster; and a fold of fresh ones folds nothing.
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of the one batch that follows
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    if norms:
        model.train()(torch.randn(shape))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _ready(candidate: Candidate, options: Options, allow_unfolded: bool, log: Log, prepare: Prepare) -> _Ready:
    """Return the engine, built and run once, at the largest batch that fits."""
    plain = replace(candidate, engine="eager", precision="fp32")  # one for all engines
    p = prepare(plain, options.input_size, allow_unfolded, options.device)
    images = torch.cat([p.images, torch.randn(options.batch_size, *options.input_size)])

    def build(batch_size: int) -> tuple[Engine, Any, Tensor, float, int]:
        before, started = held(options.device), time.perf_counter()
        engine = engines.build(candidate.engine, p.model, replace(options, batch_size=batch_size))
        inputs = engine.prepare(images[:batch_size])
        logits = engine.finish(engine.run(inputs))
        return engine, inputs, logits, time.perf_counter() - started, peak(options.device) - before

    def make(batch_size: int) -> _Ready:
        engine, inputs, logits, seconds, memory = build(batch_size)
        if torch.device(options.device).type == "cuda" and candidate.engine in ("eager", "cudagraphs"):
            # cuDNN tries its algorithms once for the process, with workspaces that are no part of what a network takes.
            del engine, inputs
            engine, inputs, logits, _, memory = build(batch_size)
        wanted = p.logits[:batch_size]
        error = float((logits[:2] - wanted).abs().max() / wanted.abs().max())
        return _Ready(engine, inputs, batch_size, memory, seconds, error, p.left_unfolded, p.cost)

    return fitting(make, options.batch_size, candidate.name, log)
