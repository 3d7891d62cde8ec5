"""Words for what a record says of code that is another today. Each is "" once the record is measured again."""

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from records import stamps

Record = dict[str, Any]
BROWSER = Path(__file__).parent.parent / "engine" / "repvgg_engine" / "browser"


def network(run: Record) -> str:
    """Say where the command of a training on masks builds another network today, by its number of parameters."""
    built = _parameters(run["arch"], len(run["per_class"]), float(_flag(run["command"], "width") or 1))
    if built == run["parameters"]:
        return ""
    return (
        " This network is another than today's: the record is older than the heads that a PSPNet has now. The same command now "
        f"builds {built / 1e6:.2f} M parameters, whose accuracy was not measured."
    )


@cache
def _parameters(arch: str, classes: int, width: float) -> int:
    """Count the parameters of a deploy form, without making them."""
    import torch

    from repvgg import create_model

    with torch.device("meta"):
        return sum(p.numel() for p in create_model(arch, num_classes=classes, width=width, deploy=True).parameters())


def photos(r: Record) -> str:
    """Say where `auto` chooses another recipe today, of what it does not measure."""
    from repvgg.train.auto import FEW

    told = {
        "weight_decay": "decays weights by {:g} instead of {:g}",
        "label_smoothing": "smooths labels by {:g} instead of {:g}",
    }
    today = {name: getattr(FEW, name) for name in told}
    changed = [words.format(today[name], r["recipe"][name]) for name, words in told.items() if today[name] != r["recipe"][name]]
    return f" Since then `auto` {' and '.join(changed)}: what it reaches now was not measured." if changed else ""


def recipe(run: Record) -> str:
    """Say where the command of a training on CIFAR-10 has another recipe today."""
    from repvgg.train.recipes import get_recipe

    given = run["recipe"]
    asked = {name: value for name, value in given.items() if f"--{name.replace('_', '-')}" in run["command"].split()}
    today = asdict(replace(get_recipe("cifar"), **asked))
    before = {"optimizer": "sgd", **given}  # the only one, before a recipe named it
    changed = [f"`{name}` {value}, now {today[name]}" for name, value in before.items() if name in today and value != today[name]]
    return f"at commit {run['machine']['commit']}, whose recipe was another ({'; '.join(changed)})" if changed else ""


def indirect(table: Record) -> str:
    """Say how far to trust the claims of Tables 4 and 5 where the two networks of one did not take turns with each other."""
    claims = table["data"].get("headlines", []) if isinstance(table["data"], dict) else []
    if all("pair" in claim for claim in claims):
        return ""
    speeds = [1 / sorted(s["reference_seconds"])[len(s["reference_seconds"]) // 2] for s in table["data"]["speeds"]]
    return (
        "The two networks of a claim did not take turns: each took turns with ResNet-18, which ran at "
        f"{min(speeds):.0f} to {max(speeds):.0f} images a second meanwhile. So a ratio may be a quarter off, more than its "
        "interval says."
    )


def embedded(predictions: Record, cifar10: Record | None) -> str:
    """Return the word for a model that came with the package before today's, where the predictions are older than that."""
    since = stamps(cifar10 or {}, "embedded").get("embedded")
    return "an earlier " if since and predictions["date"] < since["date"] else ""


def build(r: Record) -> tuple[list[int], str]:
    """Return the bytes of the engine's files for the browser, and say where others were measured."""
    sizes = [(BROWSER / name).stat().st_size for name in r["bytes"]]
    return sizes, "" if sizes == list(r["bytes"].values()) else " The figures are those of an earlier build."


def _flag(command: str, name: str) -> str:
    words = command.split()
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else ""
