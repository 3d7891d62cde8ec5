"""The table of docs/deploy.md: which engine to deploy on, from results/engines.json."""

import statistics
from typing import Any

import outdated
from layout import many, measured, table
from records import stamps

Record = dict[str, Any]
SINCE = "(results.md#the-native-engine-beside-the-others)"


def engines(r: Record, native: Record, cifar10: Record | None = None) -> str:
    """Return what to take for each batch size and precision, then every engine's figures.

    native: the record of our engine. cifar10: that of the model whose predictions are compared.
    """
    p, earlier = r["protocol"], outdated.embedded(stamps(r)["predictions"], cifar10)
    return f"""{p["model"]} at {p["input_size"][-1]} px, {many(p["threads"], "thread")}; medians of {many(p["rounds"], "round")}
in which all engines took turns, and ratios with 95% intervals.

{_choice(r)}
{_speeds_since(r, native)}
Every engine, in images a second:

{_each(r)}

Errors are the largest of any logit, relative to the largest logit.{_older(r, native)}
Memory is what a process grows by from opening the model file to its first logits, of one image; the time is from and to the same.
Caches hold what `torch.compile` compiled and which algorithms `native` chose. `--engine auto` took what had {_shares(r)}.

{_predictions(r["predictions"], earlier)}

[results/engines.json](../results/engines.json), by `python results/measure_engines.py`. {measured(stamps(r))}
"""


def _tables(r: Record) -> list[Record]:
    """Return the tables of speeds, each with its name and its machine: few images first, and float32 before other precisions."""
    found = [{**t, "name": name, "machine": stamps(r)[f"speed/{name}"]} for name, t in r["speed"].items()]
    return sorted(found, key=lambda t: (t["batch_size"], t["precision"] != "fp32"))


def _choice(r: Record) -> str:
    rows = []
    for t in _tables(r):
        (name, best), (second, next_best) = sorted(t["engines"].items(), key=lambda item: -item[1]["images_per_second"])[:2]
        low, high = (best["over_eager"][key] for key in ("low", "high"))
        over = f"{best['over_eager']['value']:.2f} ({low:.2f} to {high:.2f})"
        speeds = f"{best['images_per_second']:.0f}", over, f"`{second}`, {next_best['images_per_second']:.0f}"
        where = f"{t['machine']['processor']}, {many(t['machine']['cores'], 'core')}"
        rows.append([where, str(t["batch_size"]), t["precision"], f"`{name}`", *speeds])
    return table(["processor", "images at a time", "precision", "take", "images/s", "over PyTorch", "next best"], rows)


def _each(r: Record) -> str:
    tables, rows = _tables(r), []
    for name, loaded in r["load"].items():
        speeds = [f"{e[name]['images_per_second']:.1f}" if name in (e := t["engines"]) else "" for t in tables]
        errors = " / ".join(f"{t['engines'][name]['max_rel_err']:.0e}" for t in tables[:2] if name in t["engines"])
        times = f"{loaded['seconds']:.1f} s", f"{loaded['seconds_with_empty_caches']:.1f} s"
        rows.append([f"`{name}`", *speeds, errors, f"{loaded['bytes'] / 2**20:.0f}", *times])
    return table(
        ["engine", *(t["name"] for t in tables), "error, fp32 / bf16", "memory, MiB", "first logits after", "with empty caches"],
        rows,
    )


def _older(r: Record, native: Record) -> str:
    """Say where our engine's first prediction was measured again since, with another result."""
    when, since, said = stamps(r), stamps(native), ""
    if "start" in native and when["load"]["date"] < since["start"]["date"]:
        cold = native["start"]["native cold, batch 1"]["seconds"]
        said += f"\n`native` was measured again [since]{SINCE}: without caches its first prediction"
        said += f"\ncomes {cold:.1f} s after the start of a process."
    return said


def _speeds_since(r: Record, native: Record) -> str:
    """Say where the engines' speeds were measured again since."""
    if "a0" not in native or min(stamps(r)[f"speed/{name}"]["date"] for name in r["speed"]) >= stamps(native)["a0"]["date"]:
        return ""
    return f"\nThe speeds of the fastest engines were measured again since, with other ratios: [that table]{SINCE} counts.\n"


def _shares(r: Record) -> str:
    return ", ".join(
        f"{t['auto']['share_of_best']:.0%} of the fastest engine's speed at batch {t['batch_size']} (`{t['auto']['taken']}`)"
        for t in _tables(r)
        if "auto" in t
    )


def _predictions(r: Record, earlier: str) -> str:
    rows = [
        [f"`{to}`", *(f"{f[key]:,}" for key in ("same", "clear", "differ_where_clear")), f"{f['error']['relative']:.0e}"]
        for to, f in r["formats"].items()
    ]
    images = next(iter(r["formats"].values()))["predictions"]
    return (
        f"Predictions of {earlier}{r['model']['name']} on {images:,} test images of CIFAR-10, exported file beside PyTorch in "
        f"float64; a prediction is clear where its probability is at least {100 * r['clear']:g} points above the next label's:\n\n"
        + table(["file", "the same", "clear", "clear and different", "error"], rows)
    )


DAY = 24 * 60 * 60
OWN_RUN = ", each in a run of its own; of an engine that is in both the newer figure"


def sizing(r: Record, gpu: Record | None, data: Record | None, native: Record | None = None) -> str:
    """Return how many images a day each engine predicts on each machine that was measured, and what comes on top.

    native: the record of our engine, whose speeds of batches take the place of older ones.
    """
    p, batches = r["protocol"], [t for t in _tables(r) if t["batch_size"] > 1]
    when = {t["name"]: t["machine"] for t in batches}
    found: dict[tuple[str, str, str, int], list[float]] = {
        (f"{t['machine']['processor']}, {many(p['threads'], 'thread')}", f"`{name}`", t["precision"], t["batch_size"]): [
            e["images_per_second"]
        ]
        for t in batches
        for name, e in t["engines"].items()
    }
    newer = _newer(r, native or {})
    for (engine, precision), speed in newer.items():
        for key in found:
            if key[1:] == (f"`{engine}`", precision, 32):
                found[key] = [speed]
    if newer:
        when["engine.json, a0"] = stamps(native or {})["a0"]
    for name, f in (gpu or {"figures": {}})["figures"].items():
        words = name.split(", ")  # pair, engine, precision, batch, memory format
        for row in f.get("rows", ()):
            if len(words) == 5 and words[3] != "batch 1" and row["model"] == p["model"] and row["form"] == "deploy":
                when[name] = stamps(gpu or {})[f"figures/{name}"]
                key = when[name]["gpu"], f"`{words[1]}`, {words[4]}", words[2], row["batch_size"]
                found.setdefault(key, []).append(row["images_per_second"])
    when |= {f"data/{part}": stamp for part, stamp in stamps(data or {}, "photos", "prediction").items()}
    speeds = {key: statistics.median(measured) for key, measured in found.items()}
    rows = [
        [where, engine, precision, str(batch), f"{speed:,.0f}", f"{speed * DAY / 1e6:,.1f}", f"{1e9 / (DAY * speed):,.0f}"]
        for (where, engine, precision, batch), speed in sorted(speeds.items(), key=lambda item: -item[1])
    ]
    heads = ["machine", "engine", "precision", "batch", "images/s", "millions a day", "machines for a billion a day"]
    files = ["engines.json"] + ["engine.json"] * bool(newer) + ["gpu/speed.json"] * bool(gpu)
    return (
        f"{table(heads, rows)}\n\n{p['model']} at {p['input_size'][-1]} px: the network alone, by\n"
        f"{' and '.join(f'[results/{file}](../results/{file})' for file in files)}"
        f"{OWN_RUN if newer else ''}. {_on_top(data or {})}"
        "For another machine or model multiply what\n`repvgg bench NAME --batch-size 32` says there by 86,400.\n\n"
        f"{measured(when)}\n"
    )


def _newer(r: Record, native: Record) -> dict[tuple[str, str], float]:
    """Return speeds of batches of 32 that were measured after those of engines.json, by engine and precision."""
    if "a0" not in native or stamps(native)["a0"]["date"] < max(stamps(r)[f"speed/{name}"]["date"] for name in r["speed"]):
        return {}
    run = {name.removesuffix(" high"): f["images_per_second"] for name, f in native["a0"].get("batch 32", {}).items()}
    words = {tuple([*name.split(), "fp32"][:2]): name for name in run if len(name.split()) < 3}
    return {(engine, precision): run[name] for (engine, precision), name in words.items()}


def _on_top(data: Record) -> str:
    """Say what decoding takes, and Ray, where they were measured."""
    said = ""
    if "photos" in data:
        speed = data["photos"]["stages"]["folder"]["now"]["decode"]
        said += (
            f"Decoding comes on top: {speed:,.0f} JPEGs of\n500 x 375 a second and core, {speed * DAY / 1e6:.0f} million a day. "
        )
    if "prediction" in data:
        p = data["prediction"]
        said += (
            f"Once all have started, `--ray` does\n{p['ratio']:.2f} times as much on the same two cores; with starting, "
            f"{p['alone']['images']:,} small images came to {p['ray']['whole']:,.0f} a second instead of\n"
            f"{p['alone']['whole']:,.0f}, in {p['ray']['gigabytes']:.1f} GB instead of {p['alone']['gigabytes']:.1f}. "
        )
    return said
