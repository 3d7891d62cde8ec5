"""The steps of gpu.py that need no data: speeds of Tables 4 and 5, training throughput, and Table 8's speeds."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.bench.models import Candidate, bench
from repvgg.deploy import engines
from repvgg.measure.machine import write_record
from repvgg.measure.timing import interleave, ratio, synchroniser
from repvgg.models import zoo
from repvgg.paper.numbers import HEADLINES, TABLE8
from repvgg.train.optimizer import make_optimizer
from repvgg.train.recipes import Recipe


@dataclass(frozen=True)
class Asked:
    """The words of the command, and when the step's time is over (seconds since 1970)."""

    device: str
    tiny: bool
    data: str
    out: Path
    until: float

    @property
    def over(self) -> bool:
        return time.time() > self.until


class Record:
    """A step's figures by name, in a file that is rewritten whole after each; figures of other settings are not mixed in."""

    def __init__(self, path: Path, asked: Asked) -> None:
        self.path, self.settings = path, {"device": asked.device, "tiny": asked.tiny, "torch": torch.__version__}
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.figures: dict[str, Any] = kept["figures"] if kept.get("settings") == self.settings else {}

    def put(self, name: str, figures: Any) -> None:
        """Add figures and write the file."""
        self.figures[name] = figures
        write_record(self.path, {"settings": self.settings, "figures": self.figures})
        print(f"{name}: {json.dumps(figures)[:200]}", flush=True)

    def each(self, asked: Asked, units: Iterator[tuple[str, Callable[[], Any]]]) -> None:
        """Measure what is not here yet, until the time is over; what cannot be measured leaves its reason."""
        for name, measure in units:
            if asked.over:
                print(f"time is over before {name}", flush=True)
                return
            if name not in self.figures:
                try:
                    self.put(name, measure())
                except (RuntimeError, ValueError) as error:
                    self.put(name, {"error": str(error)[:500]})


# ------------------------------------------------------------------------------------------------------ Tables 4 and 5

PAIRS = tuple((h.fast, h.slow, h.ratio) for h in HEADLINES)
TINY_PAIRS = (("repvgg_micro", "resnet18", None),)
# Precision, engine, batch size, NHWC: the paper's protocol first, then what people deploy with.
PROTOCOLS = (
    ("fp32", "eager", 128, True),
    ("fp32", "eager", 1, True),
    ("bf16", "cudagraphs", 1, True),
    ("bf16", "eager", 128, True),
    ("fp32", "cudagraphs", 1, True),
    ("tf32", "eager", 128, True),
    ("fp32", "eager", 128, False),
    ("bf16", "compile-max", 128, True),
    ("bf16", "compile-max", 1, True),
    ("bf16", "compile", 128, True),
    ("tf32", "compile-max", 128, True),
    ("fp32", "compile-max", 128, True),
)


def speed(record: Record, asked: Asked) -> None:
    """Time the pairs of the paper's claims, folded, taking turns; then the family's forms."""
    record.each(asked, _speeds(asked))


def _speeds(asked: Asked) -> Iterator[tuple[str, Callable[[], Any]]]:
    for precision, engine, batch, nhwc in PROTOCOLS:
        if precision not in engines.precisions(engine, asked.device):
            continue
        for fast, slow, paper in TINY_PAIRS if asked.tiny else PAIRS:
            pair = (Candidate(slow, engine, precision), Candidate(fast, engine, precision))
            name = f"{fast} over {slow}, {engine}, {precision}, batch {batch}, {'NHWC' if nhwc else 'NCHW'}"
            yield name, partial(_pair, pair, batch, nhwc, paper, asked)
    for model in ("repvgg_micro",) if asked.tiny else ("repvgg_a0", "repvgg_b0", "repvgg_b1"):
        forms = (Candidate(model, form="training"), Candidate(model))
        yield f"{model} folded over its training form", partial(_pair, forms, 128, True, None, asked)


def _pair(pair: tuple[Candidate, Candidate], batch: int, nhwc: bool, paper: float | None, asked: Asked) -> dict[str, Any]:
    report = bench(
        pair,
        batch_size=2 if asked.tiny else batch,
        rounds=2 if asked.tiny else 5,
        batches=1 if asked.tiny else 10,
        warmup=1 if asked.tiny else 50 if batch > 1 else 20,
        channels_last=nhwc,
        device=asked.device,
        input_size=(3, 64, 64) if asked.tiny else None,
        log=print,
    )
    rows = [
        {name: value for name, value in row.items() if name != "seconds_per_batch_by_round"} for row in report.to_json()["rows"]
    ]
    return {"paper": paper, "ratio": asdict(report.rows[-1].ratio), "rows": rows}


# ---------------------------------------------------------------------------------------------------------- training steps


def training(record: Record, asked: Asked) -> None:
    """Time a training step of A0 and B1 beside timm's own networks of these names, taking turns."""
    record.each(
        asked,
        ((model, partial(_training, model, asked)) for model in (["repvgg_a0"] if asked.tiny else ["repvgg_a0", "repvgg_b1"])),
    )


def _training(model: str, asked: Asked) -> dict[str, Any]:
    import timm

    batch, side = (2, 64) if asked.tiny else (256, 224)
    makers: dict[str, Callable[[], nn.Module]] = {"timm": lambda: timm.create_model(model), "ours": lambda: zoo.create_model(model)}
    plain, fast = Recipe(channels_last=False), Recipe(precision="bf16")
    variants = {
        f"{who}, {'bf16, NHWC' if recipe is fast else 'fp32, NCHW'}{', compiled' if compiled else ''}": Stepper(
            make(), recipe, asked.device, compiled
        )
        for recipe, compiled in ((plain, False), (fast, False), *(() if asked.tiny else ((fast, True),)))
        for who, make in makers.items()
    }
    x = torch.randn(batch, 3, side, side, device=asked.device)
    y = torch.randint(1000, (batch,), device=asked.device)
    times = interleave(
        {name: partial(step, x, y, 0.01) for name, step in variants.items()},
        rounds=2 if asked.tiny else 5,
        batches=1 if asked.tiny else 10,
        warmup=1 if asked.tiny else 10,
        synchronise=synchroniser(asked.device),
    )
    first = next(iter(times))
    return {
        name: {"images_per_second": batch / t.median, f"over {first}": asdict(ratio(times[first], t))} for name, t in times.items()
    }


class Stepper:
    """Steps of SGD that never wait for the device: nothing is read back."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: str, compiled: bool = False) -> None:
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self.recipe, self.device, self.layout = recipe, torch.device(device), layout
        self.optimizer = make_optimizer(self.model, recipe)
        self.network: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
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
    for model in ("pspnet_repvgg_micro",) if asked.tiny else (name for name in rows if name != "pspnet_resnet50"):
        for precision in ("fp32",) if asked.tiny else ("fp32", "bf16"):
            pair = (
                Candidate("pspnet_resnet18" if asked.tiny else "pspnet_resnet50", precision=precision),
                Candidate(model, precision=precision),
            )
            paper = rows[model] / rows["pspnet_resnet50"] if model in rows else None
            yield f"{model}, {precision}", partial(_segmentation, pair, paper, asked)


def _segmentation(pair: tuple[Candidate, Candidate], paper: float | None, asked: Asked) -> dict[str, Any]:
    side = 65 if asked.tiny else 713
    rounds, batches, warmup = (2, 1, 1) if asked.tiny else (3, 2, 3)
    report = bench(
        pair,
        batch_size=1 if asked.tiny else 16,
        rounds=rounds,
        batches=batches,
        warmup=warmup,
        device=asked.device,
        input_size=(3, side, side),
        log=print,
    )
    speeds = {row.candidate.model: row.images_per_second for row in report.rows}
    return {
        "paper": paper,
        "ratio": asdict(report.rows[-1].ratio),
        "images_per_second": speeds,
        "batch_size": report.rows[-1].batch_size,
    }
