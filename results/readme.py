"""Write the measured figures of README.md and of pages in docs/ (see PAGES) from results/*.json.

python results/readme.py            # rewrites them
python results/readme.py --check    # exit code 1 if one is out of date
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_words
import rivals
import sections
from data_table import data
from deploy_table import engines, sizing
from layout import many, mean_and_deviation, measured, table
from records import stamps
from targets import targets

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent
START, END = "<!-- measured -->\n", "<!-- /measured -->"

# Of docs/results.md, in its order: the record, its heading, its words, the script that measures it.
SECTIONS: tuple[tuple[str, str, Callable[[dict[str, Any]], str], str], ...] = (
    ("engine", "The native engine beside the others", rivals.engine, "measure_engine.py"),
    ("wasm", "The native engine in the browser", sections.wasm, "measure_wasm.mjs"),
    ("predictions", "Predictions of the native engine", sections.predictions, "measure_predictions.py"),
    ("speed", "The paper's ratios of speed in other engines", sections.speed, "measure_speed.py"),
    ("cifar10", "CIFAR-10", sections.cifar10, "measure_cifar10.py"),
    ("int8", "INT8", sections.int8, "measure_int8.py"),
    ("pruning", "Pruning", sections.pruning, "measure_pruning.py"),
    ("photos", "900 photos from nothing", sections.photos, "measure_photos.py"),
    ("camvid", "CamVid", sections.camvid, "measure_camvid.py"),
    ("table8", "Table 8: ResNet-50 beside RepVGG", sections.table8, "measure_table8.py"),
    ("ablation", "Tables 6 and 7", sections.ablation, "measure_ablation.py"),
    ("training", "A training step", sections.training, "measure_training.py"),
    ("data", "Loading images, and predicting whole data sets", data, "measure_data.py"),
    ("demo", "The demo", sections.demo, "../src/repvgg/demo.py"),
    ("startup", "Start-up", sections.startup, "measure_startup.py"),
    ("timing", "The timing loop", sections.timing, "measure_timing.py"),
    ("gpu/speed", "On a GPU: speed", gpu_words.speed, "gpu.py"),
    ("gpu/training", "On a GPU: a training step", gpu_words.training, "gpu.py"),
    ("gpu/cifar10", "On a GPU: CIFAR-10", gpu_words.cifar10, "gpu.py"),
    ("gpu/ablation", "On a GPU: Tables 6 and 7", gpu_words.ablation, "gpu.py"),
    ("gpu/pspnet", "On a GPU: Table 8", gpu_words.pspnet, "gpu.py"),
)

NO_GPU = """## On a GPU

Not yet measured, for want of one. On a machine with a CUDA GPU `python results/gpu.py --budget 25 --out results/gpu` measures
Tables 4, 5 and 8's speeds and a training step there, most valuable first, in as many minutes as it is given; with `--data`
CIFAR-10 and Tables 6 and 7 too. Here it was only tried on a CPU (`--tiny`)."""

PAPER = """## The paper's Figure 1

Speed is relative to ResNet-18, which took turns with each network: left as printed, right as measured here in {engines}.
[The page of the paper](../results/paper/index.html) has every table and figure that was measured so far, each with its
method.

![accuracy against speed, the paper's and here](../results/paper/figure1.png)"""


def record(name: str) -> dict[str, Any] | None:
    """Return a record of results/, None if it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def headline() -> str:
    """Return README's table: A0 beside its fastest rivals, and what CIFAR-10 says of its predictions."""
    engine, predictions, cifar10 = (record(name) for name in ("engine", "predictions", "cifar10"))
    assert engine is not None
    rows, when = rivals.short(engine), {"engine.json": stamps(engine, "a0")["a0"]}
    if predictions is not None:
        kept = {name.split()[0]: f for name, f in predictions["engines"].items() if name.endswith("high")}
        images = next(iter(kept.values()))["images"]
        model, differ = predictions["model"]["name"], ", ".join(f"{f['differ']} in {name}" for name, f in kept.items())
        when["predictions.json"] = stamps(predictions)[""]
        rows.append([f"predictions unlike float64's, of {images:,} on CIFAR-10 (`{model}`)", differ, "", "", ""])
    if cifar10 is not None:
        e = cifar10["embedded"]
        same = f"{e['arch']}, {e['epochs']} epochs, seed "
        runs = {name: run for name, run in cifar10["runs"].items() if name.startswith(same)}
        when |= {f"cifar10.json, seed {run['seed']}": stamps(cifar10)[f"runs/{name}"] for name, run in runs.items()}
        tops = [mean_and_deviation([100 * run["top1"][form] for run in runs.values()]) for form in ("training form", "deploy form")]
        what = (
            f"CIFAR-10 top-1 of `{e['arch']}`, training form and deploy form, after {e['epochs']} epochs, n = {len(runs)}; the "
            "recipe was chosen on these images"
        )
        rows.append([what, ", ".join(f"{top1}%" for top1 in tops), "", "", ""])
    first = f"RepVGG-A0 at 224 px, {many(engine['protocol']['threads'], 'thread')}"
    return (
        table([first, "our engine", "fastest of the others", "ours over it", "errors: ours, theirs"], rows)
        + f"\n\n{measured(when)}\n"
    )


def timed(*tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the speeds of some tables of the paper were measured on, by when: not when the tables were written."""
    found: dict[str, dict[str, Any]] = {}
    for table_ in tables:
        pairs = [claim["pair"] for claim in table_["data"]["headlines"] if "pair" in claim]
        for speed in [*table_["data"]["speeds"], *pairs]:
            stamp = {**table_["machine"], "date": speed["date"], "commit": speed.get("commit") or None}
            commit = (stamp["commit"] or "").removesuffix("+")  # the first table's record makes a + for the next
            when = f"{speed['date'][:10]}, {commit}"
            found[when] = max(found.get(when, stamp), stamp, key=lambda s: s["commit"] or "")
    return found


def sections_of_results() -> str:
    """Return the body of docs/results.md: a section for each record, ending with its script and what it was measured on."""
    found = []
    for name, heading, words, script in SECTIONS:
        if (r := record(name)) is not None:
            by = f"[{name}.json](../results/{name}.json), by [{Path(script).name}](../results/{script})."
            found.append(f"## {heading}\n\n{words(r)}\n\n{by} {measured(stamps(r))}")
        elif name == "table8":
            found.append(f"## {heading}\n\nNot measured yet: [{script}](../results/{script}).")
    if (table4 := record("paper/table4")) is not None and (table5 := record("paper/table5")) is not None:
        found.append(f"## The paper's claims about speed\n\n{sections.claims(table4, table5)} {measured(timed(table4, table5))}")
    if (figure := record("paper/figure1")) is not None:
        engines = dict.fromkeys(point.get("engine", "eager") for point in figure["data"]["points"])
        told = "each network's fastest engine of " + ", ".join(engines) if len(engines) > 1 else next(iter(engines))
        told = told.replace("eager", "PyTorch alone")
        found.append(PAPER.format(engines=told))
    if record("gpu/speed") is None:
        found.append(NO_GPU)
    return "\n" + "\n\n".join(found) + "\n\n"


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / "README.md": headline,
    ROOT / "docs" / "results.md": sections_of_results,
    ROOT / "docs" / "deploy.md": lambda: engines(record("engines") or {}, record("engine") or {}, record("cifar10")),
    ROOT / "docs" / "engine.md": lambda: targets(*(record(name) or {} for name in ("engine", "predictions", "wasm"))),
    ROOT / "docs" / "segmentation.md": lambda: sections.masks(record("camvid") or {}),
    ROOT / "docs" / "scale.md": lambda: sizing(record("engines") or {}, record("gpu/speed"), record("data"), record("engine")),
}


def main(check: bool) -> int:
    """Rewrite the pages, or return 1 if one is out of date."""
    stale = 0
    for page, text in PAGES.items():
        before, _, rest = page.read_text().partition(START)
        _, _, after = rest.partition(END)
        wanted = before + START + text() + END + after
        stale |= int(page.read_text() != wanted)
        if not check:
            page.write_text(wanted)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
