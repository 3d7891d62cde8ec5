"""The native engine beside the fastest of the other engines, whichever that is, run by run of results/engine.json.

All engines of a run took turns. Its own entries begin with "native", all others are rivals. A ratio is the median of the rounds'
ratios in that run: figures of different runs are never divided. A rival's name ends with its precision, where that is not float32.
"""

import re
from collections.abc import Iterator
from typing import Any

from layout import interval, many, pace, table

from repvgg.measure.timing import Ratio, Times, ratio

Figures = dict[str, Any]  # of one engine: images_per_second, by_round, rms_error
Run = dict[str, Figures]
OURS = "native"
NAMES = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "mnn": "MNN",
    "int8": "INT8",
    "eager": "PyTorch",
    "compile": "torch.compile",
}
RUNS = {
    "a0": "RepVGG-A0",
    "a2": "RepVGG-A2",
    "b0": "RepVGG-B0",
    "b1": "RepVGG-B1",
    "micro": "`repvgg_micro` at 32 px, one thread",
    "avx2": "RepVGG-A0, ours and OpenVINO with AVX2 alone",
}
AGAINST = {
    "fp32 high": "",
    "bf16 high": "bf16",
    "int16 high": "int8",
    "int8 high": "int8",
}  # README's rows, and the rivals' precision


def named(engine: str) -> str:
    """Return an engine's name as its makers write it: "openvino int8" becomes "OpenVINO INT8"."""
    return " ".join(NAMES.get(word, word) for word in engine.split())


def rivals(run: Run, precision: str = "") -> Run:
    """Return the other engines of a run at a precision ("" is float32), the fastest first."""
    others = {name: f for name, f in run.items() if not name.startswith(OURS) and name.partition(" ")[2] == precision}
    return dict(sorted(others.items(), key=lambda item: -item[1]["images_per_second"]))


def own(run: Run) -> Run:
    """Return our entries of a run, by precision and accuracy; "exact" is direct convolution, which is no rival's."""
    return {n.removeprefix(OURS).strip(): f for n, f in run.items() if n.startswith(OURS) and not n.endswith("exact")}


def times_as_fast(ours: Figures, theirs: Figures) -> Ratio:
    """Return the median of the rounds' ratios of speed, with its 95% interval."""
    slow, fast = (Times([[1 / speed] for speed in figures["by_round"]]) for figures in (theirs, ours))
    return ratio(slow, fast)


def over(ours: Figures, theirs: Figures) -> str:
    """Return that ratio in words."""
    return interval(vars(times_as_fast(ours, theirs)))


def short(r: dict[str, Any]) -> list[list[str]]:
    """Return README's rows: A0 at each precision and batch size, beside the fastest rival of that precision."""
    rows = []
    for words, precision in AGAINST.items():
        for batch, run in _runs(r, "a0"):
            ours = own(run).get(words)
            best = next(iter(rivals(run, precision).items()), None)
            if ours and best:
                what = f"{words.split()[0]}, {_images(batch)}"
                theirs = f"{named(best[0])}, {pace(best[1]['images_per_second'])}"
                errors = ", ".join(_speed(f)[1] for f in (ours, best[1]))
                rows.append([what, f"{pace(ours['images_per_second'])} images/s", theirs, over(ours, best[1]), errors])
    return rows


def engine(r: dict[str, Any]) -> str:
    """Return the native engine's section: every engine of every run; the family; the ResNets; start-up."""
    parts = [
        f"On {many(r['protocol']['threads'], 'thread')} where no other number is named; medians of "
        f"{many(r['protocol']['rounds'], 'round')} in which all engines of a table took turns. Each ratio compares our engine "
        "with the rival that its column names: the fastest in that precision. The two may differ in error. It is the median of the "
        "rounds' ratios, with its 95% interval. Errors are root mean squares of the logits against float64, relative to how much "
        "the logits differ from image to image. The weights are random and so are the images; for a trained model see "
        "[predictions](#predictions-of-the-native-engine).",
        *(_table(f"{RUNS[part]}, {_images(batch)}", run) for part in RUNS for batch, run in _runs(r, part)),
        *_members(r),
        _resnets(r),
        _start(r),
        "![error against speed of each algorithm](../results/engine.png)",
        "Error on noise against speed of each algorithm, one for all layers; how they work: [the native engine](engine.md).",
    ]
    return "\n\n".join(filter(None, parts))


def _runs(r: dict[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    yield from r.get(part, {}).items()


def _images(batch: str) -> str:
    return "one image at a time" if batch == "batch 1" else re.sub(r"batch (\d+)", r"\1 images at a time", batch)


def _table(title: str, run: Run) -> str:
    best = {name: f for precision in ("", "bf16", "int8") for name, f in list(rivals(run, precision).items())[:1]}
    header = [title, "images/s", "error", *(f"over {named(name)}" for name in best)]
    rows = []
    for words, f in own(run).items():
        rows.append([f"native, {words}", *_speed(f), *(over(f, b) for b in best.values())])
    others = {name: f for name, f in run.items() if not name.startswith(OURS)}
    rows += [[named(name), *_speed(f), *[""] * len(best)] for name, f in others.items()]
    return table(header, rows)


def _speed(f: Figures) -> list[str]:
    return [pace(f["images_per_second"]), f"{f['rms_error']:.0e}"]


def _members(r: dict[str, Any]) -> Iterator[str]:
    runs = dict(_runs(r, "members"))
    if runs:
        beside = dict.fromkeys(name for run in runs.values() for name in rivals(run))
        yield (
            f"Other members, batch 8, {many(r['protocol']['rounds_of_members'], 'round')} each, so that the ratios are given from "
            f"lowest to highest; beside {', '.join(map(named, beside))} in float32."
        )
        header = ["", "native, fp32", "native, int16", "fastest of the others", "fp32 over it", "int16 over it", "errors"]
        yield table(header, [_member(name, run) for name, run in sorted(runs.items())])


def _member(name: str, run: Run) -> list[str]:
    ours, (rival, best) = own(run), next(iter(rivals(run).items()))
    found = [ours.get(words) for words in ("fp32 high", "int16 high")]
    return [
        f"`{name}`",
        *(pace(f["images_per_second"]) if f else "" for f in found),
        f"{named(rival)}, {pace(best['images_per_second'])}",
        *(over(f, best) if f else "" for f in found),
        ", ".join(f"{f['rms_error']:.0e}" for f in (*found, best) if f),
    ]


def _resnets(r: dict[str, Any]) -> str:
    pairs = dict(_runs(r, "against_resnets"))
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
    found = dict(_runs(r, "start"))
    if not found:
        return ""
    header = ["from the start of a process to its first prediction", "seconds", "peak memory, MiB"]
    rows = [[named(name), f"{f['seconds']:.2f}{_range(f)}", f"{f['peak_kib'] / 1024:.0f}"] for name, f in found.items()]
    return (
        "Cold: without a plan, so that the first call measures algorithms first. Otherwise the plan is in the cache. RepVGG-A0 "
        f"where no member is named. Medians{_count(found)}, and their range.\n\n{table(header, rows)}"
    )


def _count(found: Run) -> str:
    """Return of how many processes medians are, where that was recorded."""
    counts = {f.get("n", 0) for f in found.values()}
    return f" of {many(max(counts), 'process', 'processes')}" if len(counts) == 1 and max(counts) else ""


def _range(f: Figures) -> str:
    """Return from what to what the seconds went, where that was recorded."""
    return " ({:.2f} to {:.2f})".format(*f["spread"]) if "spread" in f else ""
