"""The sections of docs/results.md on a GPU: what gpu.py measured, in words and tables."""

from typing import Any

from layout import interval, table

Record = dict[str, Any]


def speed(r: Record) -> str:
    """A row for each pair and protocol that could be measured."""
    rows, failed = [], []
    for name, f in r["figures"].items():
        if "error" in f:
            failed.append(name)
            continue
        speeds = " and ".join(f"{row['images_per_second']:,.0f}" for row in reversed(f["rows"]))
        rows.append([name, "" if f["paper"] is None else f"{f['paper']:.2f}", interval(f["ratio"]), speeds])
    left_out = f"\n\nCould not be measured: {'; '.join(failed)}." if failed else ""
    return (
        "Everything folded, the two of a row taking turns; images are on the GPU already. The paper's ratios are in fp32 at batch "
        "128 on a GTX 1080Ti.\n\n"
        + table(["pair, engine, precision, batch", "paper", "ratio (95% interval)", "images/s of both"], rows)
        + left_out
    )


def cifar10(r: Record) -> str:
    """A row for each network."""
    return "Trained with images and augmentation on the GPU, from scratch.\n\n" + _trained(r)


def ablation(r: Record) -> str:
    """A row for each block."""
    return "B0 at full depth and half its width on CIFAR-10, each block with the same recipe.\n\n" + _trained(r)


def _trained(r: Record) -> str:
    rows = []
    for name, f in r["figures"].items():
        paper = f"{f['paper']:.2f}%" if f.get("paper") else ""
        ended = (
            ""
            if f["finished"]
            else f" (stopped after {min(len(run['top1_by_epoch']) for run in f['runs'])} epochs)" * bool(f["runs"])
        )
        top1 = [100 * run["top1_by_epoch"][-1] for run in f["runs"] if run["top1_by_epoch"]]
        spread = f"{min(top1):.2f} to {max(top1):.2f}%" if top1 else "none yet"
        rows.append([f"`{name}`", paper, spread + ended, str(f["n"]), str(f["epochs"])])
    return table(["network or block", "top-1 in the paper, ImageNet", "top-1 here, lowest to highest seed", "n", "epochs"], rows)


def pspnet(r: Record) -> str:
    """A row for each network and precision."""
    rows = [
        [name, f"{f['paper']:.2f}", interval(f["ratio"]), str(f["batch_size"])]
        for name, f in r["figures"].items()
        if "error" not in f
    ]
    return "Speed over PSPNet on ResNet-50, 713 x 713 pixels, deploy form.\n\n" + table(
        ["network", "paper", "here (95% interval)", "batch"], rows
    )
