"""Tables of results in the terminal: accuracies, predictions, INT8, pruning, speeds; or the same as JSON."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.cli.flags import complain
from repvgg.measure.machine import threads
from repvgg.terminal import billions, millions, print_json, print_table

if TYPE_CHECKING:
    from repvgg.bench.models import BenchReport
    from repvgg.deploy.prune import PruningReport
    from repvgg.deploy.quantize import QuantizationReport
    from repvgg.predict.job import Summary
    from repvgg.predict.masks import MaskPrediction
    from repvgg.predict.prediction import Prediction
    from repvgg.train.evaluate import Accuracy
    from repvgg.train.segmentation import Overlap
    from repvgg.train.tasks import Evaluation


MOST_CROSSED = 20  # classes whose confusion is a table
LONGEST_HEADER = 60  # letters


def show_evaluation(evaluation: "Evaluation", as_json: bool) -> None:
    """Show how good a network is: accuracies of labels, or overlap of masks."""
    shown: Any = show_accuracy if evaluation.measure == "top1" else show_overlap
    shown(evaluation, evaluation.classes, as_json)


def show_overlap(overlap: "Overlap", classes: Sequence[str], as_json: bool) -> None:
    """Show intersection over union of each class, their mean, and the share of pixels that are right."""
    if as_json:
        per_class = {name: None if math.isnan(x) else x for name, x in zip(classes, overlap.per_class, strict=True)}
        figures = {"images": overlap.images, **overlap.figures, "per_class": per_class}
        print_json({**figures, "confusion": overlap.confusion.tolist()})
        return
    labelled = int(overlap.confusion.sum())
    rows = [
        (name, _share(iou), f"{pixels / labelled:.2%}", _share(right / pixels if pixels else math.nan))
        for name, iou, pixels, right in zip(
            classes, overlap.per_class, overlap.confusion.sum(1).tolist(), overlap.confusion.diag().tolist(), strict=True
        )
    ]
    print_table(("class", "IoU", "of the pixels", "recognised"), rows, title="Intersection over union")
    line = f"mean IoU {overlap.score:.2%}   pixel accuracy {overlap.pixel_accuracy:.2%}   loss {overlap.loss:.4f}"
    print(f"{line}   {overlap.images:,} images")


def show_accuracy(accuracy: "Accuracy", classes: Sequence[str], as_json: bool) -> None:
    if as_json:
        columns = {"per_class": accuracy.per_class, "precision": accuracy.precision, "f1": accuracy.f1}
        named = {
            what: {name: None if math.isnan(a) else a for name, a in zip(classes, shares, strict=True)}
            for what, shares in columns.items()
        }
        figures = {k: getattr(accuracy, k) for k in ("images", "loss", "top1", "top5")}
        print_json({**figures, **named, "confusion": accuracy.confusion.tolist()})
        return
    if len(classes) <= MOST_CROSSED:
        _print_confusion(accuracy.confusion.tolist(), classes)
    counts = accuracy.confusion.sum(1).tolist()
    found = zip(classes, counts, accuracy.precision, accuracy.per_class, accuracy.f1, strict=True)
    rows = [(name, f"{count:,}", *map(_share, shares)) for name, count, *shares in found]
    title = "Class by class"
    if len(classes) > MOST_CROSSED:
        order = sorted(range(len(rows)), key=lambda i: (math.isnan(accuracy.per_class[i]), accuracy.per_class[i]))
        rows, title = [rows[i] for i in order[:MOST_CROSSED]], f"The {MOST_CROSSED} hardest classes"
    print_table(("class", "images", "precision", "recall", "F1"), rows, title)
    print(f"top-1 {accuracy.top1:.2%}   top-5 {accuracy.top5:.2%}   loss {accuracy.loss:.4f}   {accuracy.images:,} images")


def _print_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Print who was taken for whom, under whole names; where these are long, columns go by their numbers."""
    numbered = sum(map(len, classes)) + 2 * len(classes) > LONGEST_HEADER
    names = [f"{i} {name}" if numbered else name for i, name in enumerate(classes, 1)]
    header = ("true \\ predicted", *(map(str, range(1, len(classes) + 1)) if numbered else classes))
    rows = [(name, *(n or "." for n in row)) for name, row in zip(names, confusion, strict=True)]
    print_table(header, rows, title="Confusion matrix")


def show_answers(answers: "Iterable[Prediction | MaskPrediction]", as_json: bool) -> None:
    """Print each image's labels, or the largest classes of its mask: a table, or one JSON object a line.

    Raises ValueError at the end if some image could not be read.
    """
    header, rows = tuple[str, ...](), list[tuple[str, ...]]()
    count, failed = 0, 0
    try:
        for answer in answers:
            count += 1
            if answer.error is not None:
                failed += 1
                complain(f"repvgg: {answer.error}")
                continue
            header, row, told = _of_labels(answer) if hasattr(answer, "labels") else _of_mask(answer)
            if as_json:
                print(json.dumps({"path": answer.path, **told}))
            else:
                rows.append(row)
    finally:  # what was found before the disk, or something else, failed is worth having
        if rows:
            print_table(header, rows)
    if failed:
        raise ValueError(f"{failed} of {count} images could not be read")


def _of_labels(answer: Any) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Return a prediction's header and row of a table, and what JSON tells of it."""
    labels = [{"label": name, "probability": round(x, 6)} for name, x in answer.labels]
    more = {} if answer.explanation is None else {"explanation": answer.explanation}
    row = (answer.explanation or answer.path, *(f"{name} {x:.1%}" for name, x in answer.labels))
    return ("image", "label", *("",) * (len(row) - 2)), row, {"labels": labels, "engine": answer.engine, **more}


def _of_mask(answer: Any) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    shares = answer.shares or {}
    row = (answer.path, ", ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:5]))
    return ("image", "share of the pixels"), row, {"shares": {name: round(share, 6) for name, share in shares.items()}}


def show_predicted(summary: "Summary", as_json: bool) -> None:
    """Print what a folder of predictions holds."""
    speed = summary.here / summary.seconds if summary.here else 0.0
    if as_json:
        print_json({**asdict(summary), "images_per_second": round(speed, 1)})
        return
    unread = f", {summary.errors:,} of them could not be read (column error)" if summary.errors else ""
    here = f"; {summary.here:,} now, {speed:,.0f} img/s" if summary.here else ""
    print(f"{summary.images:,} images{unread} in {summary.parts:,} parts{here}: {summary.out}")


def show_quantization(report: "QuantizationReport", as_json: bool) -> None:
    """Show what `repvgg quantize` measured."""
    if as_json:
        print_json(report.to_json())
        return
    worst = {layer.name for layer in sorted(report.layers, key=lambda layer: -layer.added)[:3]}
    rows = [
        (layer.name, f"{layer.snr:.1f}", f"{layer.added:.2%}", "in float" if i in report.kept else "hurts" * (layer.name in worst))
        for i, layer in enumerate(report.layers)
    ]
    print_table(("after the ReLU of", "signal to noise, dB", "noise added", ""), rows)
    print("noise added: by how much the noise grows in this layer, as a share of its signal's power, against the layer before")
    hurting = " ".join(str(i) for i, layer in enumerate(report.layers) if layer.name in worst)
    print(f"hurts: the three that add most; --max-drop 0.005 leaves in float as many as it takes, --keep {hurting} these")
    print(report)
    print(report.path)


def show_pruning(report: "PruningReport", as_json: bool) -> None:
    """Show what `repvgg prune` measured."""
    if as_json:
        print_json(report.to_json())
        return
    accuracies, (large, small), speeds = (report.before, report.after), report.costs, report.speedup.images_per_second
    rows = [
        (name, f"{accuracy.top1:.2%}", millions(c.params), billions(c.macs), f"{speed:,.1f}")
        for name, accuracy, c, speed in zip(("before", "after"), accuracies, (large, small), speeds, strict=True)
    ]
    print_table(("", "top-1", "params", "MACs", f"images/s, {report.engine}"), rows, title="Deploy form")
    print(report)
    print(report.path)


def show_runs(rows: Sequence[Sequence[str]]) -> None:
    """Show runs side by side."""
    from repvgg.web.report import COMPARED

    print_table(COMPARED, rows)


def show_speeds(speeds: dict[str, float], as_json: bool) -> None:
    """Show the speed of each stage of loading data."""
    if as_json:
        print_json({"images_per_second": {stage: round(speed, 1) for stage, speed in speeds.items()}})
        return
    print_table(("stage", "images a second"), [(stage, f"{speed:,.0f}") for stage, speed in speeds.items()])


def show_reports(reports: Sequence["BenchReport"], out: Path | None, as_json: bool) -> None:
    """Show what `repvgg bench` measured, one report for each batch size: tables or JSON, and a file."""
    each = [report.to_json() for report in reports]
    figures = each[0] if len(each) == 1 else {"reports": each}
    if out is not None:
        from repvgg.disk import write_text

        write_text(out, json.dumps(figures, indent=2) + "\n")
    if as_json:
        print_json(figures)
        return
    for report in reports:
        _show_report(report)
    m = each[0]["machine"]
    print(
        f"{reports[0].rounds} rounds of {reports[0].batches} batches, taking turns; speeds relative to the first row. "
        f"{m['gpu'] or m['processor']}, {threads(m['threads'])}, PyTorch {m['versions']['torch']}"
    )


def _show_report(report: "BenchReport") -> None:
    rows = [
        (
            row.candidate.model
            + {"training": " (training form)", "space_to_batch": " (space-to-batch)"}.get(row.candidate.form, ""),
            row.candidate.engine,
            row.candidate.precision,
            f"{row.batch_size} x {row.input_size[-1]} px",
            f"{row.images_per_second:,.1f}",
            f"{row.spread[0]:,.1f} to {row.spread[1]:,.1f}",
            str(row.ratio),
            f"{row.times.median / row.batch_size * 1e3:,.2f}",
            f"{row.memory_bytes / 2**20:,.0f}",
            f"{row.load_seconds:,.2f}",
            f"{row.error:.0e}",
            f"{row.left_unfolded} BN left" if row.left_unfolded else "",
        )
        for row in report.rows
    ]
    header = (
        "model",
        "engine",
        "precision",
        "batch",
        "images/s",
        "quartiles",
        "speed (95% interval)",
        "ms/image",
        "memory, MiB",
        "load, s",
        "error",
        "",
    )
    print_table(header, rows)


def _share(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"
