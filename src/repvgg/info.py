"""Tables in the terminal: the family, one model layer by layer, recipes, accuracies, predictions; or the same as JSON."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg.measure.machine import threads
from repvgg.terminal import print_table
from repvgg.train.recipes import RECIPES, get_recipe

if TYPE_CHECKING:
    from torch import nn

    from repvgg.bench.models import BenchReport
    from repvgg.deploy.prune import PruningReport
    from repvgg.deploy.quantize import QuantizationReport
    from repvgg.predict.job import Summary
    from repvgg.predict.labels import Prediction
    from repvgg.predict.masks import MaskPrediction
    from repvgg.train.evaluate import Accuracy
    from repvgg.train.segmentation import Overlap


def show(name_or_file: str, as_json: bool) -> None:
    """The family, or a model by its name or file."""
    if not name_or_file:
        _show_family(as_json)
        return
    import torch

    from repvgg.models import zoo

    if zoo.is_file(name_or_file):
        _show_model(name_or_file, zoo.open_model(name_or_file), as_json)
        return
    name = zoo.resolve_name(name_or_file)
    if zoo.is_built_folded(name):
        with torch.device("meta"):  # shapes are enough
            model = zoo.create_model(name, deploy=True)
    else:
        model = zoo.create_model(name, deploy=True)
    _show_model(name, model.eval(), as_json)


def show_graph(path: Path, as_json: bool) -> None:
    """Operators of an exported file in order, and whether they are a plain stack."""
    from repvgg.deploy.operators import read, summary

    operators = read(path)
    if as_json:
        _print_json({"operators": [asdict(operator) for operator in operators], "summary": summary(operators)})
        return
    rows = [
        (
            number,
            operator.name,
            "x".join(map(str, operator.kernel)),
            "x".join(map(str, operator.stride)),
            operator.groups if operator.groups > 1 else "",
            operator.note,
        )
        for number, operator in enumerate(operators, 1)
    ]
    print_table(("", "operator", "kernel", "stride", "groups", ""), rows, title=str(path))
    print(summary(operators))


def _show_family(as_json: bool) -> None:
    import torch

    from repvgg.measure.costs import cost
    from repvgg.models import zoo
    from repvgg.models.pspnet import PSPNETS
    from repvgg.models.repvgg import FAMILY

    rows: list[dict[str, Any]] = []
    for name, member in FAMILY.items():
        with torch.device("meta"):
            training, deploy = (zoo.create_model(name, deploy=form) for form in (False, True))
        c = cost(deploy, zoo.manifest_of(deploy).preprocessing.input_size)
        rows.append(
            {
                "model": name,
                "depths": [1, *member.depths],
                "widths": list(member.widths()),
                "groups": member.groups,
                "squeeze_excite": member.squeeze_excite,
                "input": zoo.manifest_of(deploy).preprocessing.input_size[-1],
                "training_params": sum(p.numel() for p in training.parameters()),
                "params": c.params,
                "macs": c.macs,
                "winograd_muls": c.winograd_muls,
            }
        )
    if as_json:
        _print_json(rows)
        return
    header = ("model", "depths", "widths", "groups", "input", "params, training", "deploy", "MACs", "Winograd MULs")
    table = [
        (
            r["model"] + (" +SE" if r["squeeze_excite"] else ""),
            " ".join(map(str, r["depths"])),
            " ".join(map(str, r["widths"])),
            r["groups"],
            r["input"],
            _millions(r["training_params"]),
            _millions(r["params"]),
            _billions(r["macs"]),
            _billions(r["winograd_muls"]),
        )
        for r in rows
    ]
    print_table(header, table, title="The RepVGG family (deploy form, 1000 classes)")
    print(f"PSPNets: pspnet_NAME and pspnet_NAME_fast of each, and {', '.join(n for n in PSPNETS if 'resnet' in n)}")
    print("Comparators: " + ", ".join(name for name in zoo.list_models() if name not in FAMILY and name not in PSPNETS))


def _show_model(name: str, model: "nn.Module", as_json: bool) -> None:
    from repvgg.measure.costs import cost
    from repvgg.models import zoo

    manifest = zoo.manifest_of(model)
    c = cost(model, manifest.preprocessing.input_size)
    if as_json:
        summary = {"params": c.params, "macs": c.macs, "winograd_muls": c.winograd_muls, "bytes_moved": c.bytes_moved}
        _print_json({**asdict(manifest), **summary, "cost": [asdict(layer) for layer in c.layers]})
        return
    modules = dict(model.named_modules())
    table = [
        (
            layer.path or "(model)",
            layer.operator,
            _geometry(modules[layer.path]),
            "x".join(map(str, layer.output_shape)),
            f"{layer.params:,}" if layer.params else "",
            f"{layer.macs / 1e6:,.1f}" if layer.macs else "",
            f"{layer.winograd_muls / 1e6:,.1f}" if layer.macs else "",
        )
        for layer in c.layers
    ]
    size = " x ".join(map(str, manifest.preprocessing.input_size))
    header = ("layer", "operator", "geometry", "output", "params", "MACs (M)", "Winograd MULs (M)")
    print_table(header, table, title=f"{name}, {manifest.form} form, input {size}")
    print(c)
    if manifest.classes:
        shown = ", ".join(manifest.classes[:8]) + (" ..." if len(manifest.classes) > 8 else "")
        print(f"classes           {len(manifest.classes)}: {shown}")
    if manifest.training:
        print("trained           " + ", ".join(f"{k} {v}" for k, v in manifest.training.items() if not isinstance(v, dict)))


def _geometry(module: Any) -> str:
    """ "3x3 /2 d2 g4": kernel, stride, dilation, groups of a convolution, where they are not 1."""
    if not hasattr(module, "kernel_size") or isinstance(module.kernel_size, int):
        return ""
    marks = (
        (f" /{module.stride[0]}", module.stride[0]),
        (f" d{module.dilation[0]}", module.dilation[0]),
        (f" g{module.groups}", module.groups),
    )
    return "x".join(map(str, module.kernel_size)) + "".join(mark for mark, value in marks if value != 1)


def show_recipes(as_json: bool) -> None:
    if as_json:
        _print_json({name: asdict(recipe) for name, recipe in RECIPES.items()})
        return
    names = [f.name for f in fields(RECIPES["light"])]
    print_table(
        ("", *RECIPES), [(n.replace("_", "-"), *(str(getattr(r, n)) for r in RECIPES.values())) for n in names], title="Recipes"
    )


def show_recipe(name: str, as_json: bool) -> None:
    recipe = get_recipe(name)
    if as_json:
        _print_json(asdict(recipe))
        return
    print_table(
        ("flag", "value"), [(f"--{key.replace('_', '-')}", value) for key, value in asdict(recipe).items()], title=f"Recipe {name}"
    )


def show_overlap(overlap: "Overlap", classes: Sequence[str], as_json: bool) -> None:
    """Of masks: intersection over union of each class, their mean, and the share of pixels that are right."""
    if as_json:
        per_class = {name: None if math.isnan(x) else x for name, x in zip(classes, overlap.per_class, strict=True)}
        figures = {"images": overlap.images, **overlap.figures, "per_class": per_class}
        _print_json({**figures, "confusion": overlap.confusion.tolist()})
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
        per_class = {name: None if math.isnan(a) else a for name, a in zip(classes, accuracy.per_class, strict=True)}
        confusion = accuracy.confusion.tolist()
        _print_json(
            {
                **{k: getattr(accuracy, k) for k in ("images", "loss", "top1", "top5")},
                "per_class": per_class,
                "confusion": confusion,
            }
        )
        return
    if len(classes) <= 20:
        width = max(len(c) for c in classes)
        header = ("true \\ predicted", *(c[: max(4, 60 // len(classes))] for c in classes), "recognised")
        rows = [
            (name.ljust(width), *(n or "." for n in row), _share(share))
            for name, row, share in zip(classes, accuracy.confusion.tolist(), accuracy.per_class, strict=True)
        ]
        print_table(header, rows, title="Confusion matrix")
    else:
        worst = sorted(zip(accuracy.per_class, classes, strict=True), key=lambda pair: (math.isnan(pair[0]), pair[0]))
        print_table(("class", "recognised"), [(name, _share(share)) for share, name in worst[:20]], title="The 20 hardest classes")
    print(f"top-1 {accuracy.top1:.2%}   top-5 {accuracy.top5:.2%}   loss {accuracy.loss:.4f}   {accuracy.images:,} images")


def show_predictions(predictions: Iterable["Prediction"], as_json: bool) -> None:
    """One JSON object a line, or a table. Raises ValueError at the end if some image could not be read."""
    rows, count, failed = [], 0, 0
    for p in predictions:
        count += 1
        if p.error is not None:
            failed += 1
            print(f"repvgg: {p.error}", file=sys.stderr)
        elif as_json:
            print(json.dumps({"path": p.path, "labels": [{"label": name, "probability": round(x, 6)} for name, x in p.labels]}))
        else:
            rows.append((p.path, *(f"{name} {x:.1%}" for name, x in p.labels)))
    if rows:
        print_table(("image", "label", *("",) * (len(rows[0]) - 2)), rows)
    if failed:
        raise ValueError(f"{failed} of {count} images could not be read")


def show_masks(answers: Iterable["MaskPrediction"], as_json: bool) -> None:
    """The largest classes of each image, or one JSON object a line. Raises ValueError at the end if some could not be read."""
    rows, count, failed = [], 0, 0
    for answer in answers:
        count += 1
        if answer.error is not None:
            failed += 1
            print(f"repvgg: {answer.error}", file=sys.stderr)
            continue
        shares = answer.shares or {}
        if as_json:
            print(json.dumps({"path": answer.path, "shares": {name: round(share, 6) for name, share in shares.items()}}))
        else:
            rows.append((answer.path, ", ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:5])))
    if rows:
        print_table(("image", "share of the pixels"), rows)
    if failed:
        raise ValueError(f"{failed} of {count} images could not be read")


def show_predicted(summary: "Summary", as_json: bool) -> None:
    """Print what a folder of predictions holds."""
    speed = summary.here / summary.seconds if summary.here else 0.0
    if as_json:
        _print_json({**asdict(summary), "images_per_second": round(speed, 1)})
        return
    unread = f", {summary.errors:,} of them could not be read (column error)" if summary.errors else ""
    here = f"; {summary.here:,} now, {speed:,.0f} img/s" if summary.here else ""
    print(f"{summary.images:,} images{unread} in {summary.parts:,} parts{here}: {summary.out}")


def show_quantization(report: "QuantizationReport", as_json: bool) -> None:
    """Figures of `repvgg quantize`."""
    if as_json:
        _print_json(report.to_json())
        return
    worst = {layer.name for layer in sorted(report.layers, key=lambda layer: -layer.added)[:3]}
    rows = [
        (layer.name, f"{layer.snr:.1f}", f"{layer.added:.2%}", "in float" if i in report.kept else "hurts" * (layer.name in worst))
        for i, layer in enumerate(report.layers)
    ]
    print_table(("after the ReLU of", "signal to noise, dB", "noise added", ""), rows)
    before, after, (slow, fast) = report.before, report.after, report.speedup.images_per_second
    print(f"top-1 {before.top1:.2%} in float, {after.top1:.2%} in INT8 ({-report.drop * 100:+.2f} points), {after.images:,} images")
    print(f"{slow:,.1f} images/s in float, {fast:,.1f} in INT8: {report.speedup.ratio}")
    print(report.path)


def show_pruning(report: "PruningReport", as_json: bool) -> None:
    """Figures of `repvgg prune`."""
    if as_json:
        _print_json(report.to_json())
        return
    accuracies, (large, small), speeds = (report.before, report.after), report.costs, report.speedup.images_per_second
    rows = [
        (name, f"{accuracy.top1:.2%}", _millions(c.params), _billions(c.macs), f"{speed:,.1f}")
        for name, accuracy, c, speed in zip(("before", "after"), accuracies, (large, small), speeds, strict=True)
    ]
    print_table(("", "top-1", "params", "MACs", f"images/s, {report.engine}"), rows, title="Deploy form")
    print(f"{report.keep:.0%} of the channels: top-1 {report.cut.top1:.2%} before training, then {report.after.top1:.2%}")
    print(f"{large.macs / small.macs:.2f} times fewer MACs, {report.speedup.ratio} the speed")
    print(report.path)


def show_reports(reports: Sequence["BenchReport"], out: Path | None, as_json: bool) -> None:
    """Figures of `repvgg bench`, one for each batch size: tables or JSON, and a file."""
    each = [report.to_json() for report in reports]
    figures = each[0] if len(each) == 1 else {"reports": each}
    if out is not None:
        from repvgg.disk import atomically

        atomically(out, lambda path: path.write_text(json.dumps(figures, indent=2) + "\n"))
    if as_json:
        _print_json(figures)
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _millions(n: int) -> str:
    return f"{n / 1e6:.2f} M"


def _billions(n: int) -> str:
    return f"{n / 1e9:.2f} G"
