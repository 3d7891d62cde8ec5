"""Models, engines and precisions timed side by side.

    report = bench([Candidate("repvgg_a0"), Candidate("resnet18")], batch_size=32)
    print(report.rows[1].ratio)

The paper's protocol (section 4.1): full precision, batch 128, 50 batches of warm-up and 50 timed, conv and BN of *all* models folded.
Here the timed batches are spread over rounds in which the candidates take turns.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from repvgg import zoo
from repvgg.deploy import engines
from repvgg.deploy.engines import Engine, Options
from repvgg.record import machine
from repvgg.reparam import reparameterize
from repvgg.timing import Ratio, Times, interleave, ratio


@dataclass(frozen=True)
class Candidate:
    """What is timed. form: "deploy" (folded) or "training" (as it trains; marked as such)."""

    model: str
    engine: str = "eager"
    precision: str = "fp32"
    form: str = "deploy"

    @property
    def name(self) -> str:
        return " ".join((self.model, self.engine, self.precision, *(("training form",) if self.form == "training" else ())))


def candidates(
    models: Sequence[str], engines: Sequence[str], precisions: Sequence[str], forms: Sequence[str] = ("deploy",)
) -> list[Candidate]:
    """Every combination, model by model. Raises ValueError if an engine and a precision never go together."""
    return [Candidate(m, e, p, f) for m in models for e in engines for p in precisions for f in forms]


@dataclass(frozen=True)
class Row:
    """One candidate's figures. ratio: its speed over the reference's. memory_bytes: growth of the process (CPU) or the allocator's
    peak (CUDA) from building and running it. left_unfolded: batch norms that could not be folded."""

    candidate: Candidate
    batch_size: int
    input_size: tuple[int, int, int]
    times: Times
    ratio: Ratio
    memory_bytes: int
    left_unfolded: int

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.times.median

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of images a second over rounds."""
        low, high = self.times.quartiles
        return self.batch_size / high, self.batch_size / low


@dataclass(frozen=True)
class Report:
    """Rows in the order of the candidates; all ratios are to `reference`."""

    rows: list[Row]
    reference: Candidate
    rounds: int
    batches: int

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
                    "left_unfolded": row.left_unfolded,
                }
                for row in self.rows
            ],
            "machine": machine(),
        }


@dataclass(frozen=True)
class _Ready:
    engine: Engine
    images: Any
    batch_size: int
    memory_bytes: int
    left_unfolded: int


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
    log: Callable[[str], None] = print,
) -> Report:
    """Time the candidates, taking turns; the first is the reference.

    input_size: of all, or None for each model's own. Where memory runs out a candidate's batch is halved, with a word. Raises
    ValueError for unknown models and engines (before anything runs), and for a model that does not fold, unless allow_unfolded.
    """
    if min(batch_size, rounds, batches) < 1 or not candidates:
        raise ValueError("at least one model, one image a batch, one batch a round and one round are needed")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no CUDA device here")
    candidates = [replace(c, model=zoo.resolve_name(c.model)) for c in dict.fromkeys(candidates)]
    for c in candidates:
        engines.check(c.engine, c.precision, device)
    if threads:
        torch.set_num_threads(threads)
    options = Options(batch_size=batch_size, threads=threads, channels_last=channels_last, device=device)
    sizes = {c.model: input_size or zoo.default_preprocessing({"name": c.model, "in_chans": 3}).input_size for c in candidates}
    ready = {
        c: _ready(c, replace(options, input_size=sizes[c.model], precision=c.precision), allow_unfolded, log) for c in candidates
    }
    calls = {c.name: _call(r) for c, r in ready.items()}
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times = interleave(
        calls,
        rounds=rounds,
        batches=batches,
        warmup=warmup,
        synchronise=synchronise,
        progress=lambda done: log(f"round {done}/{rounds}"),
    )
    per_image = {c: Times([[s / ready[c].batch_size for s in r] for r in times[c.name].rounds]) for c in candidates}
    reference = candidates[0]
    rows = [
        Row(
            c,
            ready[c].batch_size,
            sizes[c.model],
            times[c.name],
            ratio(per_image[reference], per_image[c]),
            ready[c].memory_bytes,
            ready[c].left_unfolded,
        )
        for c in candidates
    ]
    return Report(rows, reference, rounds, batches)


def network(candidate: Candidate, allow_unfolded: bool = False) -> tuple[nn.Module, int]:
    """The candidate's network with random weights, in its form, eval mode; and how many of its batch norms are left."""
    torch.manual_seed(0)
    model = zoo.create_model(candidate.model).eval()
    if candidate.form == "training":
        return model, 0
    folded = reparameterize(model)
    left = len(folded.fold_report.left)  # type: ignore[union-attr, arg-type]
    if left and not allow_unfolded:
        raise ValueError(f"{candidate.model}: {left} batch norms cannot be folded; --allow-unfolded times it so, and marks it")
    return folded, left


def _ready(candidate: Candidate, options: Options, allow_unfolded: bool, log: Callable[[str], None]) -> _Ready:
    """The engine built and run once, at the largest batch that fits."""
    log(f"building {candidate.name}")
    model, left = network(candidate, allow_unfolded)
    while True:
        gc.collect()
        try:
            before = _memory(options.device)
            engine = engines.build(candidate.engine, model, options)
            images = engine.prepare(torch.randn(options.batch_size, *options.input_size))
            engine.run(images)
            return _Ready(engine, images, options.batch_size, _peak_memory(options.device) - before, left)
        except (RuntimeError, MemoryError) as error:
            if options.batch_size == 1 or not _is_out_of_memory(error):
                raise
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        options = replace(options, batch_size=options.batch_size // 2)
        log(f"{candidate.name}: out of memory, trying batch {options.batch_size}")


def _call(ready: _Ready) -> Callable[[], Any]:
    return lambda: ready.engine.run(ready.images)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "not enough memory" in text or "bad alloc" in text or "can't allocate" in text


def _memory(device: str) -> int:
    """Bytes held now: by CUDA's allocator, or by the process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def _peak_memory(device: str) -> int:
    """On CUDA the allocator's peak since; on the CPU what the process holds now, which engines do not give back."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
