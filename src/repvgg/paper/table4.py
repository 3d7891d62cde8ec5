"""Table 4: accuracy, speed and cost of the family and its comparators, and the claims that the paper draws from it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from repvgg.bench.models import Candidate
from repvgg.data import open_source
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.load import open_model
from repvgg.models.zoo import manifest_of
from repvgg.paper.agreement import spearman
from repvgg.paper.numbers import HEADLINES, TABLE4, TABLE5, Headline, ModelSpeed
from repvgg.paper.result import PaperSettings, Result, Table, interval
from repvgg.paper.speeds import Speed, chosen, in_its_engine, measure, significant
from repvgg.train.evaluate import evaluate_model

REFERENCE = "resnet18"
ENOUGH = 6  # models, for a correlation to mean something
PRINTED = {row.model: row for row in (*TABLE4, *TABLE5)}


def run(settings: PaperSettings) -> Result:
    title = "Table 4: models trained for 120 epochs"
    why = (
        "More multiply-adds need not cost more time: RepVGG's are all in plain 3x3 convolutions, which run close to what the "
        "hardware can do, and there are no additions between branches, no small operators and little memory traffic. That "
        "carries over to any machine. Winograd depends on the engine: where a library multiplies 4 times instead of 9 for a 3x3 "
        "of stride 1, as on the paper's GPU, RepVGG gains more from it than ResNet-50 and deeper ones, whose multiply-adds "
        "are mostly in 1x1 convolutions. The native engine, which runs plain networks, has it. Without it A2 has 5.1 billion "
        "multiplications to do where ResNet-50 has 3.9. "
        "(`repvgg paper winograd` tells whether it is in use.)"
    )
    return speed_tables(title, TABLE4, why, settings)


def speed_tables(title: str, printed: Sequence[ModelSpeed], why: str, settings: PaperSettings) -> Result:
    """Return the rows that were asked for, the headlines that compare two of them, and what speed goes with. Also of Table 5."""
    rows = chosen(printed, settings)
    accuracies = trained_models(settings, {row.model for row in printed})
    speeds = measure_models([row.model for row in rows], settings)
    claims = _claims(speeds, settings)
    correlations = _correlations(rows, speeds)
    tables = [_speeds(rows, speeds), *_accuracy_table(accuracies), *_headlines(claims), *_correlation_table(correlations)]
    return Result(
        title,
        tables,
        f"{_agreement(claims)}{why}",
        {
            "speeds": [asdict(speed) for speed in speeds.values()],
            "headlines": [{**asdict(h), "measured": interval(pair.ratio), "pair": asdict(pair)} for h, pair in claims],
            "rank_correlation": correlations,
            "top1": [asdict(accuracy) for accuracy in accuracies],
        },
        how=protocol(speeds, settings),
    )


def measure_models(models: Sequence[str], settings: PaperSettings) -> dict[str, Speed]:
    """Measure each model's speed in deploy form, taking turns with ResNet-18, which has an engine of its own too."""
    candidates = [in_its_engine(model, settings) for model in (*models, REFERENCE)]
    return dict(zip(models, measure([(c, candidates[-1]) for c in candidates[:-1]], settings), strict=True))


def protocol(speeds: dict[str, Speed], settings: PaperSettings) -> str:
    """Say how the paper measured, and how we did."""
    p = settings.protocol
    lowered = [f"{model} {speed.batch_size}" for model, speed in speeds.items() if speed.batch_size != p.batch_size]
    return (
        "The paper's speeds are those of one GTX 1080Ti in fp32 at batch 128, ours those of "
        f"{_engines(speeds)} in {settings.precision} on {settings.where}, at batch {p.batch_size}"
        + (f" (where memory ran out: {', '.join(lowered)})" if lowered else "")
        + f": medians and quartiles of {p.rounds} rounds, in which each model took turns with ResNet-18. Each had rounds of its "
        "own, so what compares two models is their speed over ResNet-18's; but the two of a claim about speed took turns with each "
        "other too. Every model was folded by the same reparameterize. "
        "Top-1 beside the speeds is the paper's: what is timed has random weights."
    )


def _engines(speeds: dict[str, Speed]) -> str:
    names = {speed.engine for speed in speeds.values()}
    return names.pop() if len(names) == 1 else "each model's fastest engine that computes what PyTorch does, named in its row,"


def _speeds(rows: Sequence[ModelSpeed], speeds: dict[str, Speed]) -> Table:
    header = (
        "model",
        "top-1, %",
        "examples/s, paper",
        "here",
        "in the engine",
        "quartiles",
        "speed over ResNet-18, paper",
        "here (95% interval)",
        "params, M",
        "FLOPs, B",
        "Winograd MULs, B",
    )
    cells = []
    for row in rows:
        speed = speeds[row.model]
        low, high = speed.quartiles
        cells.append(
            (
                row.printed,
                f"{row.top1:.2f}",
                f"{row.speed:,}",
                significant(speed.images_per_second),
                speed.engine,
                f"{significant(low)} to {significant(high)}",
                f"{printed_ratio(row):.2f}x",
                speed.ratio,
                _beside(_truncated(speed.params / 1e6, row), f"{row.params_m:.2f}"),
                _beside(f"{speed.macs / 1e9:.1f}", f"{row.flops_b:.1f}"),
                _beside(f"{speed.winograd_muls / 1e9:.1f}", "-" if row.muls_b is None else f"{row.muls_b:.1f}"),
            )
        )
    return Table("Accuracy, speed and cost", header, cells)


def printed_ratio(row: ModelSpeed) -> float:
    """Return the paper's speed of a model over that of ResNet-18."""
    return row.speed / PRINTED[REFERENCE].speed


@dataclass(frozen=True)
class Trained:
    """Top-1, in percent, of a trained model's deploy form on the validation split of some data."""

    model: str
    weights: str
    data: str
    images: int
    top1: float


def trained_models(settings: PaperSettings, known: set[str]) -> list[Trained]:
    """Evaluate those of the trained models that were given whose names are `known`.

    Raises ValueError without data to do so on, and where the two do not fit.
    """
    if not settings.weights:
        return []
    if not settings.data:
        raise ValueError("--weights: name what to compute their top-1 on, --data (the paper's is ImageNet, in folders)")
    source, found = open_source(settings.data), []
    for word in settings.weights:
        model = reparameterize(open_model(word))
        name = str((manifest_of(model).arch or {}).get("name"))
        if name not in known:
            settings.log(f"{word}: is a {name}, which has no row here")
            continue
        settings.log(f"top-1 of {word} on {source.name} ...")
        accuracy = evaluate_model(model, source, workers=settings.workers, device=settings.device)
        found.append(Trained(name, word, source.name, accuracy.images, 100 * accuracy.top1))
    return found


def _accuracy_table(found: Sequence[Trained]) -> list[Table]:
    rows = [(PRINTED[t.model].printed, f"{PRINTED[t.model].top1:.2f}", f"{t.top1:.2f}", t.weights, f"{t.images:,}") for t in found]
    if not rows:
        return []
    return [Table(f"Top-1 on {found[0].data}, deploy form", ("model", "top-1, %, paper", "here", "weights", "images"), rows)]


def _truncated(millions: float, row: ModelSpeed) -> str:
    """Write parameters as the paper does: cut after two digits, EfficientNet-B3's 12.1896 alone rounded."""
    return f"{millions if row.model == 'efficientnet_b3' else math.floor(millions * 100) / 100:.2f}"


def _beside(ours: str, printed: str) -> str:
    """Write our figure, and the paper's where that is another."""
    return ours if ours == printed else f"{ours} (paper {printed})"


def _claims(speeds: dict[str, Speed], settings: PaperSettings) -> list[tuple[Headline, Speed]]:
    """Return the paper's claims whose two models were timed, and the speed of the first, taking turns with the second."""
    engines = {model: Candidate(model, speed.engine, settings.precision) for model, speed in speeds.items()}
    found = [h for h in HEADLINES if h.fast in engines and h.slow in engines]
    return list(zip(found, measure([(engines[h.fast], engines[h.slow]) for h in found], settings), strict=True))


def _headlines(claims: Sequence[tuple[Headline, Speed]]) -> list[Table]:
    rows = [(f"{PRINTED[h.fast].printed} over {PRINTED[h.slow].printed}", f"{h.ratio:.2f}x", pair.ratio) for h, pair in claims]
    return [Table("The paper's claims about speed", ("speed", "paper", "here (95% interval)"), rows)] if rows else []


def _agreement(claims: Sequence[tuple[Headline, Speed]]) -> str:
    if not claims:
        return ""
    ratios = [(h.ratio, pair.ratio.value) for h, pair in claims]
    faster, reached = sum(here > 1 for _, here in ratios), sum(here >= 0.95 * paper for paper, here in ratios)
    return (
        "Of the paper's claims that one model is faster than another, as far as both were timed here, "
        f"{faster} of {len(claims)} hold, {reached} by at least 95% of what they do in the paper. "
    )


def _correlations(rows: Sequence[ModelSpeed], speeds: dict[str, Speed]) -> dict[str, Any]:
    """Correlate costs with speed over ResNet-18's, of the rows for which the paper counts MULs: the more, the slower, so -1 is
    perfect."""
    counted = [row for row in rows if row.muls_b is not None]
    paper = [row.speed for row in counted]
    here = [speeds[row.model].ratio.value for row in counted]
    flops = [speeds[row.model].macs for row in counted]
    muls = [row.muls_b or 0 for row in counted], [speeds[row.model].winograd_muls for row in counted]
    return {
        "models": len(counted),
        "FLOPs": {"paper": _finite(spearman(paper, flops)), "here": _finite(spearman(here, flops))},
        "Winograd MULs": {"paper": _finite(spearman(paper, muls[0])), "here": _finite(spearman(here, muls[1]))},
    }


def _finite(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return value if math.isfinite(value) else None


def _correlation_table(found: dict[str, Any]) -> list[Table]:
    title = f"Is it FLOPs or multiplications that speed goes with? Rank correlation over {found['models']} models"
    header = ("Spearman's rank correlation of speed with", "paper", "here")
    if found["models"] < ENOUGH:
        return []
    cells = [(what, *(f"{found[what][where]:.2f}" for where in ("paper", "here"))) for what in ("FLOPs", "Winograd MULs")]
    return [Table(title, header, cells)]
