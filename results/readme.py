"""Write the sections of measured figures in README.md and docs/deploy.md from results/*.json.

python results/readme.py            # rewrites them
python results/readme.py --check    # exit code 1 if one is out of date
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
README, DEPLOY = RESULTS.parent / "README.md", RESULTS.parent / "docs" / "deploy.md"
START, END = "<!-- measured -->\n", "<!-- /measured -->"


def cifar10(r: dict[str, Any]) -> str:
    both = r["top1"]["training form"], r["top1"]["deploy form"]
    return (
        f"**CIFAR-10.** `{r['command']}`: top-1 {both[0]:.2%} on {r['images']:,} test images in {r['minutes']:.0f} minutes "
        f"(n = {r['n']}), {both[1]:.2%} in deploy form; {r['equal_predictions']:,} of {r['images']:,} predictions are the same. "
        f"{r['parameters']['deploy form'] / 1e6:.2f} M parameters."
    )


def camvid(r: dict[str, Any]) -> str:
    """One row a run, and what a full-size image takes."""
    rows = [["model", "seed", "mean IoU", "pixel accuracy", "with scales and flip", "parameters", "training"], ["---"] * 7]
    for run in r["runs"]:
        deploy, more = run["test"]["deploy form"], run["test"]["scales 0.75, 1, 1.25 and flip"]
        on = run["trained_on"]
        rows.append(
            [
                run["arch"],
                str(run["seed"]),
                f"{deploy['mean_iou']:.2%}",
                f"{deploy['pixel_accuracy']:.2%}",
                f"{more['mean_iou']:.2%}",
                f"{run['parameters'] / 1e6:.2f} M",
                f"{run['minutes']:.0f} min on " + (on["gpu"] or f"{on['processor']}, threads: {on['threads']}"),
            ]
        )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    first, full = r["runs"][0], r["full_size"]
    masks = first["masks"]
    whole, slide = (f"{f['seconds']:.1f} s and {f['peak_resident_bytes'] / 2**30:.1f} GiB" for f in full.values())
    return (
        f"**CamVid**, {r['photos']} test photos, deploy form. `{first['command']}`:\n\n{table}\n\n"
        f"The two forms' masks differ in {masks['differ']:,} of {masks['pixels']:,} pixels, {masks['differ_beyond_rounding']} of "
        "them beyond rounding. A 2048 x 1024 image through `pspnet_repvgg_a0` in deploy form takes "
        f"{whole} whole, {slide} in windows (the whole process)."
    )


def demo(r: dict[str, Any]) -> str:
    value, low, high = r["speedup"]
    return (
        f"**Demo.** {r['arch']} reads {r['top1']['deploy form']:.1%} of the held-out digits after {r['training_seconds']:.0f} s "
        f"of training; the deploy form runs {value:.2f} times as fast as the training form (95% interval {low:.2f} to {high:.2f}, "
        f"{r['rounds']} interleaved rounds, batch {r['batch_size']}) and differs by {r['max_rel_err']:.1e} at most."
    )


def startup(r: dict[str, Any]) -> str:
    s = r["seconds"]
    return (
        f"**Start-up** (medians of {r['n']}). `repvgg --help` {s['repvgg --help']:.2f} s; `import repvgg` "
        f"{s['import repvgg'] - s['python -c pass']:.2f} s beyond Python's own; `repvgg predict` on one 640 x 480 photo with A0 "
        f"{s['repvgg predict, one image']:.1f} s, of which {r['predict_outside_the_network']:.1f} s is outside the network "
        f"(importing PyTorch alone takes {s['import torch']:.1f} s). Folding A0, each block proved: {r['fold_a0']:.1f} s."
    )


def speed(r: dict[str, Any]) -> str:
    """A row for each pair, a column for each engine."""
    engines = list(dict.fromkeys((p["fast"]["engine"], p["fast"]["precision"]) for p in r["pairs"]))
    cells: dict[str, list[str]] = {}
    for p in r["pairs"]:
        value, low, high = (p["ratio"][key] for key in ("value", "low", "high"))
        name = f"{_named(p['fast'])} over {_named(p['slow'])}"
        cells.setdefault(name, [f"{p['paper']:.2f}" if p["paper"] else ""]).append(f"{value:.2f} ({low:.2f} to {high:.2f})")
    header = ["speed", "paper", *(f"{engine}, {precision}" for engine, precision in engines)]
    lines = [header, ["---"] * len(header), *([name, *row] for name, row in cells.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    p = r["protocol"]
    return (
        f"**Speed**, batch {p['batch_size']}, everything folded: ratio with its 95% interval over {p['rounds']} rounds of "
        f"{p['batches_a_round']} batches in which the two took turns.\n\n{table}"
    )


def _named(candidate: dict[str, str]) -> str:
    return candidate["model"] + ("" if candidate["form"] == "deploy" else " in training form")


def timing(r: dict[str, Any]) -> str:
    found = {model: m["theirs_over_ours"] for model, m in r["models"].items()}
    agreement = ", ".join(f"{model} {f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for model, f in found.items())
    return (
        "**Timing loop.** Seconds a batch by `torch.utils.benchmark` over ours, on the same models: "
        f"{agreement} (medians and 95% intervals of {r['rounds']} alternating rounds)."
    )


def ablation(r: dict[str, Any]) -> str:
    """A row for each variant of Tables 6 and 7, the paper's best first."""
    s, rank = r["settings"], r["rank_correlation"]
    rows = sorted(r["variants"].items(), key=lambda item: -(item[1]["paper"] or 0))
    lines = ["| variant | top-1, paper | here | n | same predictions folded |", "| --- | --- | --- | --- | --- |"]
    for name, v in rows:
        here = "diverged" if v["mean"] is None else f"{v['mean']:.2f}" + (f" ± {v['deviation']:.2f}" if v["deviation"] else "")
        forms = [cell["forms"] for cell in v["cells"] if cell["forms"]]
        equal, images = (sum(f.get(key, 0) for f in forms) for key in ("equal", "images"))
        paper = "" if v["paper"] is None else f"{v['paper']:.2f}"
        lines.append(f"| `{name}` | {paper} | {here} | {v['n']} | {f'{equal:,} of {images:,}' if images else 'cannot be folded'} |")
    agreement = f"rank correlation with the paper's order {rank['spearman']:.2f}" if rank["spearman"] is not None else ""
    return (
        f"**Tables 6 and 7**, {s['arch']} at width {s['width']:g} on CIFAR-10"
        f"{f' ({limit:,} images of each split)' if (limit := s['limit']) else ''}, {s['epochs']} epochs ("
        f"[blocks](docs/blocks.md)); mean and deviation of top-1 over n seeds; {agreement}.\n\n" + "\n".join(lines)
    )


def int8(r: dict[str, Any]) -> str:
    """A row for each remedy."""
    rows = [f"| {name} | {_points(a)} | {len(a['kept_in_float'])} |" for name, a in r["accuracy"].items()]
    table = "\n".join(["| INT8 | top-1, change in points | layers in float |", "| --- | --- | --- |", *rows])
    speeds = [f"{to} {_interval(s['ratio'])}" for to, s in r["speed"].items()]
    images = next(iter(r["accuracy"].values()))["images"]
    return (
        f"**INT8** on A0 at 224 px, batch {r['speed']['openvino']['batch_size']}, over fp32 in the same engine, taking turns: "
        f"{'; '.join(speeds)} times as fast. On the CIFAR-10 model, {images:,} test images:\n\n{table}"
    )


def _points(accuracy: dict[str, Any]) -> str:
    top1 = accuracy["top1"]
    return f"{top1['int8']:.2%}, {(top1['int8'] - top1['float']) * 100:+.2f}"


def pruning(r: dict[str, Any]) -> str:
    forms = []
    for form in ("training", "deploy"):
        if (p := r.get(form)) is not None:
            before, after = (p["accuracy"][when]["top1"] for when in ("before", "after"))
            speed = f"{_interval(p['speed']['ratio'])} times as fast in {p['engine']}"
            forms.append(
                f"{form} form: top-1 {before:.2%} to {after:.2%}, {p['macs'][0] / p['macs'][1]:.2f} times fewer MACs, {speed}"
            )
            keep = p["keep"]
    return (
        f"**Pruning** to {keep:.0%} of the channels, then {r['recipe']['epochs']} epochs on {r['train_images']:,} images, "
        f"CIFAR-10. {'; '.join(forms)}."
    )


def engine(r: dict[str, Any]) -> str:
    """The native engine beside the others: A0 in both batch sizes and precisions, the rest of the family, the ResNets."""
    rows = [["A0 at 224 px, native engine", "images/s", "speed over OpenVINO", "error over OpenVINO's"], ["---"] * 4]
    for what in ("fp32, batch 32", "fp32, batch 1", "bf16, batch 32", "bf16, batch 1"):
        for name, f in r["a0"][what].items():
            if name in ("native high", "native fast"):
                cells = (f"{f['images_per_second']:.0f}", f"{f['ratio_to_first']:.2f}", f"{f['error_over_first']:.2f}")
                rows.append([f"{what}, `{name.removeprefix('native ')}`", *cells])
    found = [_table(rows)]
    if members := r.get("members"):
        ratios = {name: f["native high"]["images_per_second"] for name, f in members.items() if name.startswith("repvgg")}
        best = {name: max(v["images_per_second"] for k, v in members[name].items() if k != "native high") for name in ratios}
        listed = [(name.removeprefix("repvgg_"), f"{ratios[name] / best[name]:.2f}") for name in sorted(ratios)]
        table = _table([["", *(name for name, _ in listed)], ["---"] * (1 + len(listed)), ["speed", *(x for _, x in listed)]])
        found.append(f"The others, fp32 `high`, batch 8, over the better of OpenVINO and ONNX Runtime:\n\n{table}")
    pairs = [f"{name} {_interval(f['ratio'])} (paper {f['paper']})" for name, f in r["against_resnets"].items() if "over" in name]
    first = {name: f for name, f in r["start"].items() if name in ("native", "openvino")}
    starts = ", ".join(f"{name} {f['seconds']:.2f} s and {f['resident_kib'] / 1024:.0f} MiB" for name, f in first.items())
    avx2 = r["avx2"]["native high"]["ratio_to_first"]
    found.append(
        f"Against the ResNets in the best of the other engines, fp32, batch 32: {'; '.join(pairs)}. With AVX2 alone, batch 32: "
        f"{avx2:.2f} times OpenVINO. From the start of a process to its first prediction, and its memory: {starts}."
    )
    t = r["protocol"]
    return (
        f"**The native engine**, {t['threads']} threads, medians of {t['rounds']} rounds taking turns ([how](docs/engine.md)).\n\n"
        + "\n\n".join(found)
    )


def predictions(r: dict[str, Any]) -> str:
    rows = [["", "images", "other predictions than in float64", "of clear ones", "largest relative error"], ["---"] * 5]
    for name, f in r["engines"].items():
        of_clear = f"{f['differ_where_clear']} of {f['clear']:,}"
        rows.append([name, f"{f['images']:,}", str(f["differ"]), of_clear, f"{f['max_rel_err']:.1e}"])
    return (
        "**Predictions of the native engine** on CIFAR-10's test images; clear are those whose two best logits are farther apart "
        f"than twice the largest error.\n\n{_table(rows)}"
    )


PAPER = """**The paper's Figure 1**, left as printed, right on this machine (`repvgg paper all --out results/paper`; every table and
figure is in `results/paper/index.html`). Without Winograd, which none of these libraries has in use here, A2 and B3 fall behind
where the paper's GPU had them ahead; the native engine above has it.

![accuracy against speed, the paper's and here](results/paper/figure1.png)"""


def training(r: dict[str, Any]) -> str:
    steps, state, p = r["steps"], r["state"], r["protocol"]
    reference = next(iter(steps))
    rows = [["", "images/s", f"over {reference}"], ["---"] * 3]
    for name, s in steps.items():
        rows.append([name, f"{s['img_per_s']:.1f}", "1" if name == reference else _interval(s["faster_than"][reference])])
    return (
        f"**A training step** of A0 at {p['input'].split(',')[0]}, batch {p['batch_size']}, {p['rounds']} rounds taking turns. "
        f"A saved state of A0 takes {state['megabytes']:.0f} MB and {state['seconds_to_write']:.2f} s.\n\n{_table(rows)}"
    )


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f}, {ratio['low']:.2f} to {ratio['high']:.2f}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "engine": engine,
    "predictions": predictions,
    "speed": speed,
    "int8": int8,
    "pruning": pruning,
    "cifar10": cifar10,
    "camvid": camvid,
    "ablation": ablation,
    "training": training,
    "demo": demo,
    "startup": startup,
    "timing": timing,
}


def measured() -> str:
    """The section's text: a paragraph for each file of figures, and the machine they come from."""
    figures = {name: json.loads(path.read_text()) for name in SECTIONS if (path := RESULTS / f"{name}.json").exists()}
    paragraphs = [SECTIONS[name](figure) for name, figure in figures.items()]
    machines = {_machine(figure["machine"]) for figure in figures.values()}
    if (RESULTS / "paper" / "table4.json").exists():
        paragraphs.append(PAPER)
    return (
        "\n\n".join([*paragraphs, f"Measured on {'; '.join(sorted(machines))}. Scripts and figures are in [results/](results)."])
        + "\n"
    )


def _machine(m: dict[str, Any]) -> str:
    return f"{m['processor']}, {m['cores']} cores, Python {m['python']}, PyTorch {m['versions']['torch']}"


def engines() -> str:
    """What to deploy on, for each batch size and precision; and every engine's figures."""
    r = json.loads((RESULTS / "engines.json").read_text())
    p, m = r["protocol"], r["machine"]
    choice = [["processor", "images at a time", "precision", "take", "images/s", "over PyTorch", "next best"], ["---"] * 7]
    for table in r["speed"]:
        best, second = sorted(table["engines"].items(), key=lambda item: -item[1]["images_per_second"])[:2]
        name, found = best
        low, high = (found["over_eager"][key] for key in ("low", "high"))
        choice.append(
            [
                _processor(m),
                str(table["batch_size"]),
                table["precision"],
                f"`{name}`",
                f"{found['images_per_second']:.0f}",
                f"{found['over_eager']['value']:.2f} ({low:.2f} to {high:.2f})",
                f"`{second[0]}`, {second[1]['images_per_second']:.0f}",
            ]
        )
    heads = [f"batch {t['batch_size']}, {t['precision']}" for t in r["speed"]]
    each = [["engine", *heads, "error, fp32 / bf16", "memory, MiB", "first logits after", "with empty caches"]]
    each.append(["---"] * len(each[0]))
    for name, loaded in r["load"].items():
        speeds = [f"{e[name]['images_per_second']:.1f}" if name in (e := t["engines"]) else "" for t in r["speed"]]
        figures = [
            " / ".join(f"{t['engines'][name]['max_rel_err']:.0e}" for t in r["speed"][:2] if name in t["engines"]),
            f"{loaded['bytes'] / 2**20:.0f}",
            f"{loaded['seconds']:.1f} s",
            f"{loaded['seconds_with_empty_caches']:.1f} s",
        ]
        each.append([f"`{name}`", *speeds, *figures])
    shares = ", ".join(
        f"{t['auto']['share_of_best']:.0%} of the fastest engine's speed at batch {t['batch_size']} (`{t['auto']['taken']}`)"
        for t in r["speed"]
        if "auto" in t
    )
    return f"""{p["model"]} at {p["input_size"][-1]} px, {p["threads"]} threads; medians of {p["rounds"]} rounds in which all
engines took turns, and ratios with 95% intervals.

{_table(choice)}

Every engine, in images a second:

{_table(each)}

Memory is what a process grows by from opening the model file to its first logits, of one image; the time is from and to the same.
Caches hold what `torch.compile` compiled and which algorithms `native` chose. `--engine auto` took what had {shares}.

{_predictions(r["predictions"])}

Measured on {_machine(m)}: [results/engines.json](../results/engines.json), by `python results/measure_engines.py`.
"""


def _predictions(r: dict[str, Any]) -> str:
    rows = [["file", "the same", "clear", "clear and different", "error"], ["---"] * 5]
    for to, f in r["formats"].items():
        counts = (f"{f[key]:,}" for key in ("same", "clear", "differ_where_clear"))
        rows.append([f"`{to}`", *counts, f"{f['error']['relative']:.0e}"])
    return (
        f"Predictions of {r['model']['name']} on {f['predictions']:,} test images of CIFAR-10, exported file beside PyTorch in "
        "float64; a prediction is clear where its two best logits are farther apart than twice the largest error:\n\n"
        + _table(rows)
    )


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _processor(m: dict[str, Any]) -> str:
    return f"{m['processor']}, {m['cores']} cores"


def main(check: bool) -> int:
    stale = 0
    for page, text in ((README, measured()), (DEPLOY, engines())):
        before, _, rest = page.read_text().partition(START)
        _, _, after = rest.partition(END)
        wanted = before + START + text + END + after
        stale |= int(page.read_text() != wanted)
        if not check:
            page.write_text(wanted)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
