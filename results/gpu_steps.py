"""The steps of gpu.py that need no data: speeds of Tables 4 and 5, training throughput, and Table 8's speeds."""

import functools
import gc
import itertools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import keep
from torch import nn

from repvgg.bench.memory import fitting, held, peak
from repvgg.bench.models import Candidate, bench, prepared
from repvgg.deploy import engines
from repvgg.measure.timing import interleave, ratio, synchroniser
from repvgg.models import zoo
from repvgg.paper.numbers import HEADLINES, TABLE4, TABLE5, TABLE8
from repvgg.train.optimizer import make_optimizer
from repvgg.train.recipes import Recipe


@dataclass(frozen=True)
class Asked:
    """The words of the command, a folder for what training goes on from, and when the time is over (seconds since 1970)."""

    device: str
    tiny: bool
    data: str
    work: Path
    until: float

    @property
    def over(self) -> bool:
        return time.time() > self.until

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


class Record:
    """A step's figures by name, each with its own stamp, in a file that is rewritten whole after each.

    Figures of other settings are not mixed in: their file stays, under another name.
    """

    def __init__(self, path: Path, asked: Asked) -> None:
        self.path, self.device, self.figures, self.began = path, asked.device, dict[str, Any](), time.time()
        gpu = torch.cuda.get_device_name(asked.device) if asked.on_cuda else None
        self.settings = {
            "device": asked.device,
            "gpu": gpu,
            "tiny": asked.tiny,
            "data": Path(asked.data).name,
            "torch": torch.__version__,
        }
        kept = json.loads(path.read_text()) if path.exists() else {"settings": self.settings, "figures": {}}
        if kept.get("settings") == self.settings:
            self.figures = kept["figures"]
        else:
            names = (path.with_stem(f"{path.stem}.{i}") for i in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))

    def put(self, name: str, figures: Any) -> None:
        """Add figures and write the file."""
        self.figures[name] = figures
        keep(self.path, f"figures/{name}", figures, {"settings": self.settings}, self.device)
        print(f"{name}: {json.dumps(figures)[:200]}", flush=True)

    def _failed(self, name: str) -> bool:
        """Say whether a figure could not be measured, or its process crashed; not, that the clock ended it."""
        until = self.figures.get(name, {}).get("until")
        return name in self.figures and (until is None or self.began < until)

    def each(self, asked: Asked, units: Iterator[tuple[str, Callable[[], Any]]]) -> None:
        """Measure what is not here yet, until the time is over.

        What cannot be measured leaves its reason, and is tried again after all others: one that crashes stops no other for ever.
        """
        left = [(name, measure) for name, measure in units if "error" in self.figures.get(name, {"error": "not tried"})]
        for name, measure in sorted(left, key=lambda unit: self._failed(unit[0])):
            if asked.over:
                print(f"time is over before {name}", flush=True)
                return
            self.put(name, {"error": "its process ended before it was measured", "until": asked.until})  # stays if that happens
            try:
                self.put(name, measure())
            except Exception as error:  # of compilers and drivers: any; the next figure may be had all the same
                traceback.print_exc()
                self.put(name, {"error": f"{type(error).__name__}: {error}"[:500]})
            torch.compiler.reset()  # lest what was compiled, and its CUDA graphs, stay
            gc.collect()
            if asked.on_cuda:
                torch.cuda.synchronize(asked.device)  # an illegal access is met again here: nothing more can be had of this process
                torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ Tables 4 and 5

CLAIMS = tuple((h.fast, h.slow, h.ratio) for h in HEADLINES)
ROWS = {row.model: row.speed for row in (*TABLE4, *TABLE5)}
CLAIMED = {name for claim in CLAIMS for name in claim[:2]}
OTHERS = tuple((name, "resnet50", speed / ROWS["resnet50"]) for name, speed in ROWS.items() if name not in CLAIMED)
# Precision, engine, batch size, NHWC: the paper's protocol, then what people deploy with, then what takes long to compile.
PAPER = ("fp32", "eager", 128, False)
PROTOCOLS = (
    ("bf16", "cudagraphs", 1, True),
    ("bf16", "cudagraphs", 128, True),
    ("fp32", "eager", 128, True),
    ("tf32", "eager", 128, True),
    ("fp32", "cudagraphs", 1, True),
    ("tf32", "cudagraphs", 1, True),
    ("bf16", "eager", 128, True),
    ("fp32", "eager", 1, True),
    ("bf16", "compile-max", 128, True),
    ("bf16", "compile-max", 1, True),
    ("bf16", "compile", 128, True),
    ("tf32", "compile-max", 128, True),
    ("fp32", "compile-max", 128, True),
)
WRONG = {"fp32": 0.01}  # of the logits' size: an error that is no rounding; in lower precisions 0.5
TWICE = ("repvgg_a0", "repvgg_b0", "repvgg_b1")  # timed in both forms
PREPARE = functools.cache(prepared)  # a network is folded, and run in float64, once for all protocols


def speed(record: Record, asked: Asked) -> None:
    """Time the pairs of the paper's claims, and its other networks over ResNet-50, folded, taking turns."""
    record.each(asked, _speeds(asked))


def _speeds(asked: Asked) -> Iterator[tuple[str, Callable[[], Any]]]:
    claims, others = ((("repvgg_micro", "resnet18", None),), ()) if asked.tiny else (CLAIMS, OTHERS)
    yield from _pairs((*claims, *others), [PAPER], asked)
    for model in ("repvgg_micro",) if asked.tiny else TWICE:
        forms = (Candidate(model, form="training"), Candidate(model))
        yield f"{model} folded over its training form, eager, fp32, batch 128, NCHW", partial(_pair, forms, None, asked, 128, False)
    yield from _pairs(claims, PROTOCOLS, asked)
    yield from _pairs(others, PROTOCOLS, asked)


def _pairs(pairs: Any, protocols: Any, asked: Asked) -> Iterator[tuple[str, Callable[[], Any]]]:
    for precision, engine, batch, nhwc in protocols:
        if precision not in engines.precisions(engine, asked.device):
            continue
        for fast, slow, paper in pairs:
            pair = (Candidate(slow, engine, precision), Candidate(fast, engine, precision))
            name = f"{fast} over {slow}, {engine}, {precision}, batch {batch}, {'NHWC' if nhwc else 'NCHW'}"
            yield name, partial(_pair, pair, paper, asked, batch, nhwc)


def _pair(
    pair: tuple[Candidate, Candidate],
    paper: float | None,
    asked: Asked,
    batch: int,
    nhwc: bool,
    side: int = 0,
    often: tuple[int, int, int] = (6, 10, 50),
) -> dict[str, Any]:
    """Time the second of a pair over the first. side: of the images, 0 for the networks' own; often: rounds, batches, warm-up."""
    rounds, batches, warmup = (2, 1, 1) if asked.tiny else often
    how: dict[str, Any] = {"rounds": rounds, "batches": batches, "warmup": warmup}
    report = bench(
        pair,
        batch_size=2 if asked.tiny else batch,
        **how,
        channels_last=nhwc,
        device=asked.device,
        input_size=(3, side, side) if side else (3, 64, 64) if asked.tiny else None,
        log=print,
        prepare=PREPARE,
    )
    rows = report.to_json()["rows"]
    for row in rows:
        if row["max_rel_err"] is None or row["max_rel_err"] > WRONG.get(row["precision"], 0.5):
            raise ValueError(f"{row['model']} in {row['engine']} is off by {row['max_rel_err'] or math.inf:.1g} of its logits")
    unequal = len({row["batch_size"] for row in rows}) > 1  # memory ran out for one of them
    return {"paper": paper, **how, "ratio": asdict(report.rows[-1].ratio), "batch_unequal": unequal, "rows": rows}


# ---------------------------------------------------------------------------------------------------------- training steps

OFTEN = (6, 10, 10)  # rounds, batches, warm-up; fewer rounds than six give no 95% interval
# Recipe, and how it is compiled ("" for not at all): what one trains with, then the paper's, which takes longest.
KINDS = {
    "bf16, NHWC": (Recipe(precision="bf16"), ""),
    "bf16, NHWC, compiled": (Recipe(precision="bf16"), "default"),
    "fp32, NCHW": (Recipe(channels_last=False), ""),
}


def training(record: Record, asked: Asked) -> None:
    """Time a training step of A0 and B1 beside timm's own networks of these names, taking turns."""
    models = ("repvgg_a0",) if asked.tiny else ("repvgg_a0", "repvgg_b1")
    record.each(
        asked,
        (
            (
                f"{model}, {name}",
                partial(fitting, partial(_both, model, recipe, mode, asked), 2 if asked.tiny else 256, model, print),
            )
            for model in models
            for name, (recipe, mode) in KINDS.items()
            if not (asked.tiny and mode)
        ),
    )


def _both(model: str, recipe: Recipe, mode: str, asked: Asked, batch: int) -> dict[str, Any]:
    """Time a step of timm's network and of ours."""
    import timm

    side = 64 if asked.tiny else 224
    x, y = torch.randn(batch, 3, side, side, device=asked.device), torch.randint(1000, (batch,), device=asked.device)
    steps, memory = dict[str, Callable[[], Any]](), dict[str, int]()
    for who, make in (("timm", timm.create_model), ("ours", zoo.create_model)):
        before = held(asked.device)
        steps[who] = partial(Stepper(make(model), recipe, asked.device, mode), x, y, 0.01)
        steps[who]()
        held(asked.device)  # the peak is counted from here on: in the first step cuDNN tries algorithms that take much memory
        steps[who]()
        memory[who] = peak(asked.device) - before
    rounds, batches, warmup = (2, 1, 1) if asked.tiny else OFTEN
    how: dict[str, Any] = {"rounds": rounds, "batches": batches, "warmup": warmup}
    times = interleave(steps, **how, synchronise=synchroniser(asked.device))
    return {
        "batch_size": batch,
        **how,
        "seconds_by_round": {who: t.by_round for who, t in times.items()},
        "images_per_second": {who: batch / t.median for who, t in times.items()},
        "memory_bytes": memory,
        "ratio": asdict(ratio(times["timm"], times["ours"])),
    }


class Stepper:
    """Steps of SGD that never wait for the device: nothing is read back. mode: of torch.compile, "" for not compiled."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: str, mode: str = "") -> None:
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self.recipe, self.device, self.layout = recipe, torch.device(device), layout
        self.optimizer = make_optimizer(self.model, recipe)
        self.network: Any = torch.compile(self.model, dynamic=False, mode=mode) if mode else self.model
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        torch.backends.cudnn.benchmark = True

    def __call__(self, x: torch.Tensor, y: torch.Tensor, lr: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.logits(x)
        loss = nn.functional.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits: torch.Tensor = self.network(x.contiguous(memory_format=self.layout))
        return logits.float()


# ---------------------------------------------------------------------------------------------------------------- Table 8


def pspnet(record: Record, asked: Asked) -> None:
    """Time Table 8's networks against PSPNet on ResNet-50: 713 pixels, batch 16."""
    record.each(asked, _pspnets(asked))


def _pspnets(asked: Asked) -> Iterator[tuple[str, Callable[[], Any]]]:
    rows = {row.model: row.speed for row in TABLE8}
    slow = "pspnet_resnet18" if asked.tiny else "pspnet_resnet50"
    for precision in ("fp32",) if asked.tiny else ("fp32", "bf16"):
        for model in ("pspnet_repvgg_micro",) if asked.tiny else (name for name in rows if name != slow):
            pair = (Candidate(slow, precision=precision), Candidate(model, precision=precision))
            paper = rows[model] / rows[slow] if model in rows else None
            side = 65 if asked.tiny else 713
            yield f"{model}, {precision}", partial(_pair, pair, paper, asked, 16, precision == "bf16", side, (6, 1, 3))
