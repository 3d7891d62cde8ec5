"""The native engine beside the fastest of the other engines, whichever that is, row by row of results/engine.json.

A row is one run, in which all its engines took turns. Its own entries begin with "native", all others are rivals. A ratio is the
median over the rounds of that run: figures of different runs are never divided.
"""

import re
import statistics
from collections.abc import Iterator
from typing import Any

from layout import interval, many, table

Figures = dict[str, Any]  # of one engine: images_per_second, by_round, rms_error
OURS = "native"
PRECISIONS = ("fp32", "bf16", "int8")  # README has a row for each, measured or not
NAMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "mnn": "MNN", "eager": "PyTorch", "compile": "torch.compile"}
FP32 = ("openvino", "onnxruntime", "ncnn", "mnn")  # a run that lacks one of them may lack the fastest
UNMEASURED = "not yet measured"


def named(engine: str) -> str:
    """Return an engine's name as its makers write it: "mnn exact" becomes "MNN exact"."""
    first, _, more = engine.partition(" ")
    return " ".join(filter(None, (NAMES.get(first, first), more)))


def rivals(run: dict[str, Any]) -> dict[str, Figures]:
    """Return the other engines of a run, the fastest first."""
    others = {name: f for name, f in run.items() if not name.startswith(OURS) and isinstance(f, dict)}
    return dict(sorted(others.items(), key=lambda item: -item[1]["images_per_second"]))


def own(run: dict[str, Any]) -> dict[str, Figures]:
    """Return our entries of a run, by the accuracy asked for; "exact" is direct convolution, which is no rival's."""
    return {n.removeprefix(OURS).strip(): f for n, f in run.items() if n.startswith(OURS) and not n.endswith("exact")}


def times_as_fast(ours: Figures, theirs: Figures) -> float:
    """Return the median ratio of speed over the rounds that both had."""
    if "by_round" not in ours or "by_round" not in theirs:
        return float(ours["images_per_second"] / theirs["images_per_second"])
    return float(statistics.median(a / b for a, b in zip(ours["by_round"], theirs["by_round"], strict=True)))


def against_best(what: str, run: dict[str, Any], level: str) -> list[str]:
    """Return the cells: our speed, the fastest rival and its speed, the ratio, both errors against float64."""
    ours, others = own(run)[level], rivals(run)
    speed = f"{ours['images_per_second']:.3g} images/s"
    if not others:
        return [speed, UNMEASURED, UNMEASURED, f"{ours['rms_error']:.0e}"]
    name, best = next(iter(others.items()))
    errors = f"{ours['rms_error']:.0e}, {best['rms_error']:.0e}"
    return [
        speed,
        f"{named(name)}, {best['images_per_second']:.3g}{_untried(what, others)}",
        f"**{times_as_fast(ours, best):.2f}**",
        errors,
    ]


def _untried(what: str, others: dict[str, Figures]) -> str:
    """Say which rivals the run lacks: in float32 all four, elsewhere nothing unless one stands alone."""
    missing = [named(name) for name in FP32 if what.startswith("fp32") and not any(n.split()[0] == name for n in others)]
    if missing:
        return f" ({', '.join(missing)}: {UNMEASURED})"
    return " (no other measured)" if len(others) == 1 else ""


def short(r: dict[str, Any]) -> list[list[str]]:
    """Return README's rows: the default accuracy at each precision and batch size, measured or not."""
    rows = []
    for precision in PRECISIONS:
        runs = {what: run for what, run in r["a0"].items() if what.startswith(f"{precision},") and own(run)}
        rows += [[_words(what), *against_best(what, run, next(iter(own(run))))[:3]] for what, run in runs.items()]
        rows += [] if runs else [[precision, UNMEASURED, "", ""]]
    return rows


def engine(r: dict[str, Any]) -> str:
    """Return the native engine's section: A0 by precision, batch size and accuracy; the family; the ResNets; start-up."""
    header = ["RepVGG-A0 at 224 px", "native engine", "fastest of the others", "ratio", "errors: ours, theirs"]
    rows = [[f"{_words(what)}, `{level}`", *against_best(what, run, level)] for what, run in _runs(r) for level in own(run)]
    parts = [
        f"On {many(r['protocol']['threads'], 'thread')}, medians of {many(r['protocol']['rounds'], 'round')} in which the engines "
        "of a row took turns. The rival of a row is the fastest of the other engines in that run, whatever its error: "
        f"{_rivals_of(r)}. The ratio is ours over that rival's. Errors are root mean squares of the logits against "
        "float64, relative to how much the logits differ from image to image.",
        table(header, rows),
        *_members(r),
        _resnets(r),
        _start(r),
        "![error against speed of each algorithm](../results/engine.png)",
        "Error against speed of each algorithm, one for all layers; how they work: [the native engine](engine.md).",
    ]
    return "\n\n".join(filter(None, parts))


def _runs(r: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((what, run) for what, run in r["a0"].items() if isinstance(run, dict))
    if "avx2" in r:
        yield "fp32, batch 32 (AVX2 alone)", r["avx2"]


def _rivals_of(r: dict[str, Any]) -> str:
    found = dict.fromkeys(name for _, run in _runs(r) for name in rivals(run))
    return ", ".join(map(named, found))


def _words(what: str) -> str:
    """Turn "fp32, batch 32" into "fp32, 32 images at a time"."""
    images, plural = re.subn(r"batch (\d\d+)", r"\1 images at a time", what)
    return images if plural else what.replace("batch 1", "one image at a time")


def _members(r: dict[str, Any]) -> Iterator[str]:
    runs = {name: run for name, run in r.get("members", {}).items() if name.startswith("repvgg")}
    if runs:
        beside = {name: f for run in runs.values() for name, f in rivals(run).items()}
        yield (
            f"Other members, fp32 `high`, batch 8, {many(r['protocol']['rounds_of_members'], 'round')} each, beside "
            f"{', '.join(map(named, beside))}{_untried('fp32', beside)}."
        )
        rows = [[f"`{name}`", *against_best("", run, "high")] for name, run in sorted(runs.items())]
        yield table(["", "native engine", "fastest of the others", "ratio", "errors: ours, theirs"], rows)


def _resnets(r: dict[str, Any]) -> str:
    pairs = {name: f for name, f in r.get("against_resnets", {}).items() if isinstance(f, dict)}
    if not pairs:
        return ""
    others = ", ".join(named(n) for n in next(iter(pairs.values()))["images_per_second"] if not n.startswith(OURS))
    rows = [[_pair(name), named(f["best"]), interval(f["ratio"]), f"{f['paper']:.2f}"] for name, f in pairs.items()]
    header = ["fp32, batch 32", "the ResNet runs in", "ratio of speed (95% interval)", "paper"]
    return (
        f"RepVGG in the native engine against a ResNet in the fastest engine for it of {others}. The paper runs both in the same "
        f"library.\n\n{table(header, rows)}"
    )


def _pair(name: str) -> str:
    return " over ".join(f"`{model}`" for model in name.split(" over "))


def _start(r: dict[str, Any]) -> str:
    """Without a warm cache the first call measures algorithms, so it says which it was."""
    found = {name: f for name, f in r.get("start", {}).items() if isinstance(f, dict)}
    if not found:
        return ""
    header = ["from the start of a process to its first prediction", "seconds", "resident memory, MiB"]
    rows = [
        [named(name), f"{f['seconds']:.2f}", f"{f['resident_kib'] / 1024:.0f}"] for name, f in found.items() if "resident_kib" in f
    ]
    return "With a warm cache: the algorithms were chosen, and weights exported, before.\n\n" + table(header, rows)
