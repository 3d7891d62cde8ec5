"""The sections of docs/results.md on a GPU: what gpu.py measured, in words and tables."""

from typing import Any

from layout import interval, table

Record = dict[str, Any]
MIB = 2**20


def speed(r: Record) -> str:
    """Return the table of the pairs and protocols that could be measured."""
    rows = []
    for name, f in _measured(r):
        slow, fast = f["rows"]
        speeds = " and ".join(f"{row['images_per_second']:,.0f}" for row in (fast, slow))
        known = not fast["engine"].startswith("compile")  # which tunes, with memory of its own
        memory = " and ".join(f"{row['memory_bytes'] / MIB:,.0f}" for row in (fast, slow)) if known else ""
        errors = " and ".join(f"{row['max_rel_err']:.0e}" for row in (fast, slow))
        rows.append([name, _ratio(f["paper"]), interval(f["ratio"]), speeds + _unequal(f), memory, errors])
    return (
        f"Everything folded but what is called a training form, the two of a row taking turns{_rounds(r)}; images are on the GPU "
        "already. The paper's ratios are in fp32 at batch 128 on a GTX 1080Ti. Memory is the allocator's peak while a network is "
        "built and run, once cuDNN has chosen its algorithms; of compiled ones it is not known. Errors are the largest of the "
        "logits against float64, relative to the largest logit; what is off by more than 1% in fp32, or 50% in lower precisions, "
        "is left out.\n\n"
        + table(
            [
                "pair, engine, precision, batch, format",
                "paper",
                "ratio (95% interval)",
                "images/s of both",
                "MiB of both",
                "errors",
            ],
            rows,
        )
        + _left_out(r)
    )


def training(r: Record) -> str:
    """Return the table of networks and kinds of step."""
    rows = []
    for name, f in _measured(r):
        speeds = " and ".join(f"{f['images_per_second'][who]:,.0f}" for who in ("ours", "timm"))
        memory = " and ".join(f"{f['memory_bytes'][who] / MIB:,.0f}" for who in ("ours", "timm"))
        rows.append([name, interval(f["ratio"]), speeds, memory, str(f["batch_size"])])
    return (
        f"A step of SGD in training form at 224 px, beside timm's own network of the same name, the two taking turns{_rounds(r)}; "
        "images are on the GPU already. Memory is the allocator's peak in a step.\n\n"
        + table(["network, step", "ours over timm's (95% interval)", "images/s, ours and timm's", "MiB of both", "batch"], rows)
        + _left_out(r)
    )


def cifar10(r: Record) -> str:
    """Return the table of networks."""
    return "Trained with images and augmentation on the GPU, from scratch.\n\n" + _trained(r)


def ablation(r: Record) -> str:
    """Return the table of blocks."""
    width = next(iter(r["figures"].values()))["options"]["width"]
    return f"B0 at full depth and width {width:g} on CIFAR-10, each block with the same recipe.\n\n" + _trained(r)


def _trained(r: Record) -> str:
    rows = []
    for name, f in r["figures"].items():
        top1 = [100 * run["top1_by_epoch"][-1] for run in f["runs"] if run["finished"]]
        spread = " to ".join(dict.fromkeys(f"{x:.2f}" for x in (min(top1), max(top1)))) + "%" if top1 else "none yet"
        begun = [len(run["top1_by_epoch"]) for run in f["runs"] if not run["finished"]]
        ended = f" ({'another ' * bool(top1)}stopped after {min(begun)})" if begun else "" if f["runs"] else " (not begun)"
        same = [_folded(run) for run in f["runs"] if run["finished"]]
        paper = "" if f.get("paper") is None else f"{f['paper']:.2f}%"
        rows.append([f"`{name}`", paper, spread, str(f["n"]), f"{f['epochs']}{ended}", "; ".join(same)])
    header = [
        "network or block",
        "top-1 in the paper, ImageNet",
        "top-1 here, lowest to highest seed",
        "n",
        "epochs",
        "the same folded",
    ]
    return table(header, rows)


def _folded(run: Record) -> str:
    """Say how many predictions the deploy form shares, or why there is none."""
    folded = run.get("folded")
    return f"{folded['equal']:,} of {folded['images']:,}" if folded else f"no fold: {run.get('refused', 'not linear')}"


def pspnet(r: Record) -> str:
    """Return the table of networks and precisions."""
    rows = [
        [name, _ratio(f["paper"]), interval(f["ratio"]), f"{f['rows'][-1]['batch_size']}{_unequal(f)}"] for name, f in _measured(r)
    ]
    return (
        "Speed over PSPNet on ResNet-50, 713 x 713 pixels, eager, deploy form, fp32 in NCHW and bf16 in NHWC, the two of a row "
        f"taking turns{_rounds(r)}.\n\n" + table(["network", "paper", "here (95% interval)", "batch"], rows) + _left_out(r)
    )


def _rounds(r: Record) -> str:
    """Return ", N rounds", of all figures."""
    counts = sorted({f["rounds"] for _, f in _measured(r)})
    return f", {' or '.join(map(str, counts))} rounds" if counts else ""


def _measured(r: Record) -> list[tuple[str, Record]]:
    return [(name, f) for name, f in r["figures"].items() if "error" not in f]


def _left_out(r: Record) -> str:
    failed = [name for name, f in r["figures"].items() if "error" in f]
    return f"\n\nCould not be measured: {'; '.join(failed)}." if failed else ""


def _ratio(paper: float | None) -> str:
    return "" if paper is None else f"{paper:.2f}"


def _unequal(f: Record) -> str:
    """Say where memory ran out for one of a pair."""
    sizes = " and ".join(str(row["batch_size"]) for row in reversed(f["rows"]))
    return f" (unequal batches: {sizes})" if f["batch_unequal"] else ""
