"""The sections of docs/results.md: each turns a record of results/ into words and tables."""

import math
from collections.abc import Iterable
from typing import Any

import outdated
from layout import interval, many, mean_and_deviation, pace, table

from repvgg.paper import agreement

Record = dict[str, Any]


def predictions(r: Record) -> str:
    header = ["", "images", "predictions unlike float64's", "of clear ones", "largest relative error"]
    rows = [
        [name, f"{f['images']:,}", str(f["differ"]), f"{f['differ_where_clear']} of {f['clear']:,}", f"{f['max_rel_err']:.1e}"]
        for name, f in r["engines"].items()
    ]
    return (
        "CIFAR-10's test images through the native engine at each precision and accuracy. A prediction is clear where, in float64, "
        f"its probability is at least {100 * r['clear']:g} points above that of the next label.\n\n{table(header, rows)}"
    )


def wasm(r: Record) -> str:
    ours, theirs = (r["median_ms"][name] for name in ("native", "onnxruntime-web"))
    low, high = (f"{r['ratio'][end]:.2f}" for end in ("low", "high"))
    version, (bytes_, earlier) = r["machine"]["versions"]["onnxruntime-web"], outdated.build(r)
    sizes = [f"{size / 1000:.0f}" for size in bytes_]
    return (
        f"RepVGG-A0, one image of 224 pixels at a time, one thread each, {many(r['rounds'], 'round')} in turns, in Node: "
        f"{ours:.0f} ms with relaxed SIMD (which Node 20 uses only on request), and {theirs:.0f} ms in "
        f"onnxruntime-web {version}: **{r['ratio']['median']:.2f} times** as fast (90% of rounds between "
        f"{low} and {high}); without relaxed SIMD **{r['ratio_without_relaxed_simd']['median']:.2f} times**. "
        f"The target was {r['target']:g} times. The engine is {many(len(sizes), 'file')} of {' and '.join(sizes)} kB; "
        f"a browser with relaxed SIMD loads the one made for it.{earlier}"
    )


def speed(r: Record) -> str:
    """Return a table with a row for each pair and a column for each engine."""
    cells: dict[str, dict[str, str]] = {}
    for p in r["pairs"].values():
        row = cells.setdefault(f"{_named(p['fast'])} over {_named(p['slow'])}", {})
        here = interval(p["ratio"]) if "ratio" in p else f"cannot run it ({p['left_out']})"
        row |= {"paper": f"{p['paper']:.2f}" if p["paper"] else "", p["fast"]["engine"]: here}
    header = list(dict.fromkeys(("paper", *(p["fast"]["engine"] for p in r["pairs"].values()))))
    p = r["protocol"]
    return (
        f"Batch {p['batch_size']}, fp32, folded unless a row says training form. Each cell is a ratio with its 95% interval over "
        f"{many(p['rounds'], 'round')} of {many(p['batches_a_round'], 'batch', 'batches')}, in which the two took turns. "
        "How Winograd affects them: [speed](speed.md#what-to-expect).\n\n"
        + table(["ratio of speed", *header], [[name, *(row.get(column, "") for column in header)] for name, row in cells.items()])
    )


def claims(table4: Record, table5: Record) -> str:
    """Return a table of the comparisons of Tables 4 and 5, the paper's and ours."""
    found = [claim for r in (table4, table5) for claim in r["data"]["headlines"]]
    rows = [
        [f"`{c['fast']}` over `{c['slow']}`", f"{c['ratio']:.2f}", interval({**c["measured"], "value": c["measured"]["ratio"]})]
        for c in found
    ]
    holds, doubt = sum(c["measured"]["ratio"] > 1 for c in found), next(filter(None, map(outdated.indirect, (table4, table5))), "")
    in_turns = f" {doubt} Pairs that took turns: [above](#the-native-engine-beside-the-others)." if doubt else ""
    return (
        "Each network runs in its own fastest engine that was verified here, which for RepVGG is the native one. "
        f"{holds} of the paper's {len(found)} claims that one network is faster than another hold on this processor.{in_turns}\n\n"
        f"{table(['ratio of speed', 'paper', 'here (95% interval)'], rows)}\n\n"
        "[table4.json](../results/paper/table4.json) and [table5.json](../results/paper/table5.json), by `repvgg paper`."
    )


def _named(candidate: dict[str, str]) -> str:
    return f"`{candidate['model']}`" + ("" if candidate["form"] == "deploy" else " in training form")


def int8(r: Record) -> str:
    """Return a table with a row for each remedy, the best first."""
    best_first = sorted(r["accuracy"].items(), key=lambda item: -item[1]["top1"]["int8"])
    rows = [[f"{name}{_planned(a)}", _points(a), str(len(a["kept_in_float"]))] for name, a in best_first]
    old = [name for name, a in r["accuracy"].items() if name.endswith("openvino") and not a.get("constants_folded")]
    uncorrected = (
        "\n\nThe rows of OpenVINO are without bias correction, whatever their name says: they were measured before it worked there."
    )
    speeds = [f"{to} {interval(s['ratio'])}" for to, s in r["speed"].items()]
    images = next(iter(r["accuracy"].values()))["images"]
    return (
        f"A0 at 224 px, batch {r['speed']['openvino']['batch_size']}: INT8 over fp32 in the same engine, taking turns: "
        f"{'; '.join(speeds)} times as fast. Top-1 of {_trained(r['accuracy'].values())} on {images:,} test images:\n\n"
        + table(["INT8", "top-1, change in points", "layers left in float"], rows)
        + (uncorrected if old else "")
    )


def _planned(accuracy: Record) -> str:
    """Say how many layers the native engine's plan computed in 16 bits, where that was recorded."""
    plan = [algorithm for algorithm in accuracy.get("plan", ()) if algorithm]
    return f", as planned here: {sum('int16' in a for a in plan)} of {many(len(plan), 'layer')} in 16 bits" if plan else ""


def _trained(records: Iterable[Record]) -> str:
    """Name the networks of some records; those that do not say theirs are of repvgg_micro."""
    names = dict.fromkeys(r.get("arch") or "repvgg_micro" for r in records)
    return f"{' and '.join(f'`{name}`' for name in names)} of the [table above](#cifar-10)"


def _points(accuracy: Record) -> str:
    top1 = accuracy["top1"]
    return f"{top1['int8']:.2%}, {(top1['int8'] - top1['float']) * 100:+.2f}"


def pruning(r: Record) -> str:
    """Return a table of the forms that were pruned, and one of plain layers beside residual blocks."""
    forms = {form: r[form] for form in ("training", "deploy") if form in r}
    rows = []
    for form, p in forms.items():
        before, after = (p["accuracy"][when]["top1"] for when in ("before", "after"))
        faster = f"{interval(p['speed']['ratio'])} in {p['engine']}"
        rows.append([f"{form} form", f"{before:.2%}", f"{after:.2%}", f"{p['macs'][0] / p['macs'][1]:.2f}", faster])
    keep = next(iter(forms.values()))["keep"]
    return (
        f"{_trained(forms.values())}, cut to {keep:.0%} of its channels, then trained for {many(r['recipe']['epochs'], 'epoch')} "
        f"on {r['train_images']:,} images. *After*: the best epoch, by the test images.\n\n"
        + table(["pruned", "top-1 before", "best epoch after", "times fewer MACs", "times as fast"], rows)
        + (_structures(r["structures"]) if "structures" in r else "")
    )


def _structures(s: Record) -> str:
    """Return a table of means and standard deviations over seeds, and tell what the pruning took from each structure."""
    rows, lost, after = [], {}, {}
    for name in ("plain", "residual"):
        tops = {when: [100 * run["accuracy"][when]["top1"] for run in s[name]] for when in ("before", "cut", "after")}
        macs, params = ([f"{n / 1e6:.2f} M" for n in s[name][0][what]] for what in ("macs", "params"))
        rows.append([name, *(mean_and_deviation(top1) for top1 in tops.values()), " to ".join(macs), " to ".join(params)])
        after[name] = ", ".join(f"{top1:.1f}" for top1 in tops["after"])
        lost[name] = [before - after for before, after in zip(tops["before"], tops["after"], strict=True)]
    keep = {name: f"{s[name][0]['keep']:.0%}" for name in lost}
    return (
        "\n\nThe paper says that shortcuts hinder pruning (section 3.1). This compares RepVGG-B0, folded to plain layers before "
        f"it is cut, with Table 7's residual reorganisation of its layers. At width {s['width']:g} both were trained for "
        f"{many(s['recipe']['epochs'], 'epoch')} of {s['train_images']:,} images, cut by one method to {keep['plain']} and "
        f"{keep['residual']} of every set of channels, leaving as many MACs, and trained for "
        f"{many(s['after']['epochs'], 'epoch')} more. Means and standard deviations of top-1, %, over "
        f"{many(len(s['plain']), 'seed')}; pruning took {mean_and_deviation(lost['plain'])} points from plain layers and "
        f"{mean_and_deviation(lost['residual'])} from residual blocks. Seed by seed, top-1 after: plain {after['plain']}; residual "
        f"{after['residual']}. Deep plain layers train badly, which is why the paper has branches: this table does not tell what "
        "was lost to the cut from what was lost to that.\n\n"
        + table(["structure", "top-1 before", "cut", "best epoch after", "MACs", "parameters"], rows)
    )


WANTED, SEEDS = ((26, 60, 93.3), (14, 30, 92.2)), 3  # epochs, minutes, top-1
JUDGED = (
    "The recipe was chosen by trainings that were judged on the same 10,000 images, seed 0 among them. That favours it a little. "
    "The last model counts, not the best."
)


def cifar10(r: Record) -> str:
    """Return a table with a row for each run, and name the model that is in the package."""
    forms = ("training form", "deploy form", "native engine")
    header = ["model", "epochs", "seed", "minutes", *(f"top-1, {form}" for form in forms), "same predictions"]
    rows, made = [], []
    for run in r["runs"].values():
        shares = [f"{run['top1'][form]:.2%}" if form in run["top1"] else "" for form in forms]
        same = min(run["equal_predictions"].values())
        facts = f"{run['recipe']['epochs']}", f"{run['seed']}", f"{run['minutes']:.0f}"
        rows.append([f"`{run['arch']}`", *facts, *shares, f"{same:,} of {r['images']:,}"])
        notes = list(filter(None, (run["note"], outdated.recipe(run))))
        made.append(f"- `{run['command']}`" + (f": {'; '.join(notes)}" if notes else ""))
    text = "\n".join([table(header, rows), "", _wanted(r), JUDGED, "", "Made by", "", *dict.fromkeys(made)])
    if e := r.get("embedded"):
        text += (
            f"\n\nThe model `cifar10` that comes with the package is the deploy form of `{e['arch']}` after {e['epochs']} epochs, "
            f"seed {e['seed']}, stored in {e['stored_as']} ({e['bytes'] / 1e6:.1f} MB): {e['top1']:.2%}, measured from that file"
            + (f" ({e['unfinished']})." if "unfinished" in e else ".")
        )
    return f"{text.strip()}\n\n![accuracy against minutes](../results/cifar10.png)"


def _wanted(r: Record) -> str:
    """Compare the trainings of `repvgg_mini` with what was wanted of them."""
    told = []
    for epochs, minutes, wanted in WANTED:
        runs = [run for name, run in r["runs"].items() if name.startswith(f"repvgg_mini, {epochs} epochs")]
        reached = "not measured"
        if runs:
            worst, longest = min(100 * run["top1"]["deploy form"] for run in runs), max(run["minutes"] for run in runs)
            reached = f"at least {worst:.2f}%, within {longest:.0f} minutes, n = {len(runs)}"
        told.append(f"{wanted}% within {minutes} minutes, n = {SEEDS} ({reached})")
    return f"Wanted of `repvgg_mini`: {'; '.join(told)}."


def camvid(r: Record) -> str:
    """Return a table with a row for each run, and tell what a full-size image takes."""
    header = ["model", "seed", "mean IoU", "pixel accuracy", "mean IoU with scales and flip", "parameters", "training"]
    rows = []
    for run in r["runs"]:
        deploy, more = run["test"]["deploy form"], run["test"]["scales 0.75, 1, 1.25 and flip"]
        on = run["trained_on"]
        shares = (f"{x:.2%}" for x in (deploy["mean_iou"], deploy["pixel_accuracy"], more["mean_iou"]))
        where = on["gpu"] or f"{on['processor']}, {many(on['threads'], 'thread')}"
        rows.append(
            [
                f"`{run['arch']}`",
                str(run["seed"]),
                *shares,
                f"{run['parameters'] / 1e6:.2f} M",
                f"{run['minutes']:.0f} min on {where}{f', {note}' if (note := run.get('note')) else ''}",
            ]
        )
    first, full = r["runs"][0], r["full_size"]
    masks, side = first["masks"], math.isqrt(first["masks"]["pixels"] // first["masks"]["photos"])
    whole, slide = (f"{f['seconds']:.1f} s and {f['peak_resident_bytes'] / 2**30:.1f} GiB" for f in full.values())
    return (
        f"{r['photos']} test photos, deploy form. `{first['command']}`:\n\n{table(header, rows)}\n\n"
        f"n = {len(rows)}.{outdated.network(first)} On {masks['photos']} of the photos, at {side} x {side} pixels, the two forms' "
        f"masks differ in {masks['differ']:,} of {masks['pixels']:,} pixels. "
        "A 2048 x 1024 image through `pspnet_repvgg_a0` in deploy form takes "
        f"{whole} whole, {slide} in windows (the whole process){', with the heads of then' if outdated.network(first) else ''}."
    )


def masks(r: Record) -> str:
    """Say whose masks the pictures of docs/segmentation.md show."""
    first = r["runs"][0]
    width = first["command"].partition("--width ")[2].partition(" ")[0] or "1"
    return (
        "Below are four photos of the test split as the narrow PSPNet of the [measured](results.md#camvid) run sees them\n"
        f"(`{first['arch']}` at width {width}, trained on CamVid's 367 photos from scratch).{outdated.network(first)}\n"
    )


def table8(r: Record) -> str:
    """Return a table of ResNet-50 and RepVGG, trained alike, beside the paper's figures of the whole networks."""
    rows = []
    for run in r["runs"]:
        test, paper = run["test"]["deploy form"], run["paper"]
        printed = f"{paper['mean_iou']:.2f}%" if paper else ""
        shares = [f"{test[name]:.2%}" for name in ("mean_iou", "pixel_accuracy")]
        costs = [f"{run['parameters'] / 1e6:.2f} M", f"{run['macs'] / 1e9:.2f} B", f"{run['minutes']:.0f}"]
        rows.append([f"`{run['arch']}`", printed, *shares, *costs])
    header = ["model", "mean IoU, paper (Cityscapes)", "mean IoU", "pixel accuracy", "parameters", "MACs", "minutes of training"]
    first, s, recipe = r["runs"][0], r["speed"], r["runs"][0]["recipe"]
    return (
        f"CamVid again, at width {r['width']:g}, both from random weights by the same recipe: {many(recipe['epochs'], 'epoch')} of "
        f"the same photos in the same order, one seed each (n = 1), so a few points either way mean nothing. {r['photos']} "
        f"test photos, deploy form:\n\n{table(header, rows)}\n\nIn deploy form the second runs {interval(s['ratio'])} times as "
        f"fast as `{first['arch']}`, taking turns, at {' x '.join(map(str, s['input_size'][1:]))} in {s['engine']}."
    )


ENOUGH_EPOCHS = 15  # before which the variants have not separated
SAME_ORDER = 0.85  # rank correlation with the paper that was wanted


def ablation(r: Record) -> str:
    """Return a table of the variants of Tables 6 and 7, the paper's best first."""
    s, pilot = r["settings"], r.get("pilot") or {}
    rows = []
    for name, v in sorted(r["variants"].items(), key=lambda item: -(item[1]["paper"] or 0)):
        here = "diverged" if v["mean"] is None else f"{v['mean']:.2f}" + (f" ± {v['deviation']:.2f}" if v["deviation"] else "")
        forms = [cell["forms"] for cell in v["cells"] if cell["forms"]]
        equal, images = (sum(f.get(key, 0) for f in forms) for key in ("equal", "images"))
        paper = "" if v["paper"] is None else f"{v['paper']:.2f}"
        rows.append([f"`{name}`", paper, here, str(v["n"]), f"{equal:,} of {images:,}" if images else "cannot be folded"])
    limit = f", {s['limit']:,} images of each split" if s["limit"] else ""
    warning = (
        f"**{many(s['epochs'], 'epoch')} decide nothing about accuracy**: the paper trains for 120 on ImageNet, and so early, what "
        "trains fastest leads. What these runs do show is that every variant trains, folds and then predicts the same.\n\n"
    )
    inside = ", 16 of 32 pixels a side inside" if s["small_input"] is False else ""
    cells = {name: [None if c["top1"] is None else 100 * c["top1"] for c in v["cells"]] for name, v in r["variants"].items()}
    curves = any(v.get("top1_by_epoch") for v in r["variants"].values())
    return (
        (warning if s["epochs"] < ENOUGH_EPOCHS else "")
        + f"{s['arch']} at width {s['width']:g} on CIFAR-10{limit}{inside}, {many(s['epochs'], 'epoch')}; mean and standard "
        f"deviation of top-1 over n seeds ([the blocks](blocks.md)). {agreement.words(cells, pilot)}\n\n"
        + _needed(r)
        + table(["variant", "top-1, paper", "top-1, here", "n", "same predictions folded"], rows)
        + (_pilot(pilot, r["rates"], s["epochs"]) if pilot else "")
        + ("\n\n![top-1 by epoch](../results/ablation-curves.png)" if curves else "")
    )


def _needed(r: Record) -> str:
    """Tell what would decide the order, where it is not the paper's."""
    rank = r["rank_correlation"]["spearman"]
    curves = [curve for v in r["variants"].values() for curve in v.get("top1_by_epoch", [])[:1] if len(curve) > 1]
    if rank is None or rank >= SAME_ORDER or not curves:
        return ""
    rises = [100 * (curve[-1] - curve[-2]) for curve in curves]
    best = 100 * max(curve[-1] for curve in curves)
    return (
        f"In the last epoch the variants still gained {min(rises):.1f} to {max(rises):.1f} points (seed 0), and the best of them "
        f"ended at {best:.0f}%. A rank correlation of {SAME_ORDER:g} was wanted. What would decide it is not known. Longer "
        "trainings of wider networks are the next thing to try: step `ablation` of [gpu.py](../results/gpu.py) does 60 epochs at "
        "half of B0's width.\n\n"
    )


def _pilot(pilot: agreement.Pilot, taken: dict[str, float], epochs: int) -> str:
    rates, rows = agreement.rates_of(pilot), []
    for name, by_rate in pilot.items():
        rows.append(
            [f"`{name}`", *(agreement.percent(by_rate[rate]) for rate in rates), f"{taken[name]:g}" if name in taken else ""]
        )
    told = f"The pilot that chose the learning rates: top-1, %, of seed 0 after {many(epochs, 'epoch')} at each rate."
    return f"\n\n{told}\n\n" + table(["variant", *rates, "taken"], rows)


def training(r: Record) -> str:
    steps, state, p = r["steps"], r["state"], r["protocol"]
    rows = [
        [name, *(_trained_at(row[whose]) for whose in ("timm", "ours")), interval(row["ours"]["over_timms_best"])]
        for name, row in steps.items()
    ]
    return (
        f"A0 at {p['input'].split(',')[0]}, batch {p['batch_size']}, {many(p['rounds'], 'round')} taking turns, each in a process "
        "of its own. A signal in a cell killed that process in a round or at its end: PyTorch's backward pass of a strided 1x1 "
        "with 3 input channels damages the heap in channels_last. Our 1x1 avoids it. "
        f"A saved state of A0 takes {state['megabytes']:.0f} MB and {state['seconds_to_write']:.2f} s.\n\n"
        + table(["images/s", "timm", "ours", f"ours over timm's best ({r['timms_best']})"], rows)
    )


def _trained_at(network: Record) -> str:
    """Tell a training's images a second, and the signal that it died of."""
    return " ".join(filter(None, (pace(network["img_per_s"]) if network["img_per_s"] else "", network["died_of"])))


def demo(r: Record) -> str:
    value, low, high = r["speedup"]
    return (
        f"{r['arch']} reads {r['top1']['deploy form']:.1%} of the held-out digits after {r['training_seconds']:.0f} s of training. "
        f"The deploy form runs {value:.2f} times as fast as the training form (95% interval {low:.2f} to {high:.2f}, "
        f"{many(r['rounds'], 'interleaved round')}, batch {r['batch_size']}) and differs by {r['max_rel_err']:.1e} at most."
        + (f" The whole demo took {r['seconds']:.0f} s." if "seconds" in r else "")
    )


def startup(r: Record) -> str:
    s = r["seconds"]
    ranges = {name: f" ({low:.2f} to {high:.2f})" for name, (low, high) in r.get("spread", {}).items()}
    of = f"medians of {r['n']}{', and their range' if ranges else ''}"
    told = ", ".join(
        f"{_shown(name)} {s[name]:.2f} s{ranges.get(name, '')}"
        for name in s
        if not name.startswith("import") and name != "engine auto"
    )
    by = f" The photo was read by the engine {r['predicted_by']}." if "predicted_by" in r else ""
    first = f" `--engine auto` the first time: {s['engine auto']:.1f} s (n = {r['n_engine_auto']})." if "engine auto" in s else ""
    return (
        f"Processes, start to end, with A0; {of}: {told}.{by}{first} Importing PyTorch, which none of these "
        f"needs, takes {s['import torch']:.1f} s; folding A0 with its proof {r['fold_a0']:.1f} s."
    )


def _shown(command: str) -> str:
    """Return a command in the way of code, with what is said of it outside."""
    words, comma, rest = command.partition(",")
    return f"`{words}`{comma}{rest}" if words.startswith(("repvgg", "python")) else command


def photos(r: Record) -> str:
    counts, recipe, asked = r["photos"], r["recipe"], r["asked"]
    return (
        f"`repvgg train --arch {asked['arch']} --init none --data PHOTOS`, all else as `--recipe auto` chose, on {counts['train']} "
        f"images ({r['what']}): **{r['test_top1']['best']:.1%}** top-1 on {counts['test']:,} images that the run never saw "
        f"({r['val_top1']:.1%} on the {counts['val']} that chose the best epoch), after {r['minutes']:.1f} minutes "
        f"({r['cpu_minutes']:.1f} of all cores together; --minutes {asked['minutes']:g}, seed {asked['seed']}, n = 1). Chosen: "
        f"{recipe['epochs']} epochs in batches of {recipe['batch_size']} at {recipe['image_size']} pixels in "
        f"{recipe['precision']}. No photos were at hand: these images were 32 pixels wide.{outdated.photos(r)}"
    )


def timing(r: Record) -> str:
    rows = [[f"`{model}`", interval(m["theirs_over_ours"])] for model, m in r["models"].items()]
    return (
        "Seconds a batch by `torch.utils.benchmark` over seconds a batch by our loop, on the same models: medians and 95% "
        f"intervals of {many(r['rounds'], 'alternating round')}.\n\n" + table(["model", "theirs over ours"], rows)
    )
