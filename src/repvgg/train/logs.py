"""The log of a run: metrics.jsonl, TensorBoard's events, Weights & Biases if asked for, and a curve to look at."""

import io
import json
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repvgg.disk import Log, atomically, in_a_line, read_text, write_text
from repvgg.train.events import Events


class Logs:
    """Lines of values by step. What cannot be written is told once, and stops no training. Use as a context manager."""

    def __init__(
        self,
        out: Path | None,
        step: int = 0,
        wandb: str = "",
        settings: dict[str, Any] | None = None,
        log: Log = print,
    ) -> None:
        """Go on after `step`: what was written of later steps will come again. out: None in a process that does not write.

        Raises ValueError if wandb is not installed.
        """
        self.log, self.told = log, set[str]()
        self.path: Path | None = None
        self.board: Events | None = None
        self.wandb: Any = None
        if out is None:
            return
        self.path = out / "metrics.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step] if step else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.path, text)
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise ValueError("--wandb needs wandb: pip install wandb") from None
            run = _id(out, step)
            self.wandb = client.init(project=wandb, name=out.name, dir=str(out), config=settings, id=run, resume="allow")
        self.board = _board(out, step, log)
        if step:
            self.write(step=step, resumed_from=step)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self._try("TensorBoard's events", self.board.close)
        if self.wandb is not None:
            self._try("Weights & Biases", self.wandb.finish)

    def write(self, step: int, **values: Any) -> None:
        """Write one line, and a point of every curve."""
        if self.path is None:
            return
        self._try("metrics.jsonl", partial(_append, self.path, {"step": step, **values}))
        curves = {name: value for name, value in values.items() if name not in ("epoch", "resumed_from")}
        if self.board is not None:
            self._try("TensorBoard's events", partial(_add, self.board, curves, step))
        if self.wandb is not None:
            self._try("Weights & Biases", partial(self.wandb.log, curves, step=step))

    def _try(self, what: str, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # a full disk, a lost connection, whatever a client library makes of these
            if what not in self.told:
                self.told.add(what)
                self.log(f"{what}: cannot be written ({in_a_line(error)}); training goes on")


def _id(out: Path, step: int) -> str:
    """Return the folder's own name for its run, a new one for a run that begins: folders may share a name, and steps only rise."""
    path = out / "wandb_id"
    if not step or not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text()


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _add(board: Events, curves: dict[str, float], step: int) -> None:
    for name, value in curves.items():
        board.add_scalar(name, value, step)


def _board(out: Path, step: int, log: Log) -> Events | None:
    """Return a writer of events; none where TensorBoard is missing or broken, which is no reason not to train."""
    if not find_spec("tensorboard"):
        return None
    try:
        return Events(out, step + 1 if step else 0)
    except OSError as error:
        log(f"TensorBoard's events: cannot be written ({error.strerror}); training goes on")
        return None
    except Exception as error:  # a protobuf of another version raises its own kind
        log(f"without TensorBoard, which does not load ({type(error).__name__}): pip install -U tensorboard protobuf")
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are whole: a process that was killed may have left half of one."""
    lines = []
    for text in read_text(path).splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


TITLES = {"loss": "loss", "top1": "top-1, %", "mean_iou": "mean IoU, %", "pixel_accuracy": "pixel accuracy, %"}
FAR = 2.0  # times the third quartile: what is above leaves the chart at its top


def draw_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss, and what else there is of `TITLES`, by epoch, in training and evaluation, as PNG; the best epoch is marked.

    Points of training are means over an epoch; before the first one is over, what there is by step. Nothing is drawn where
    matplotlib is not installed.
    """
    if not lines or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    epochs = [line for line in lines if "val_loss" in line]
    trained, rows, unit = ("train_", epochs, "epoch") if epochs else ("", lines, "step")
    shown = [
        name for name in TITLES if name == "loss" or any(f"{mark}{name}" in line for mark in (trained, "val_") for line in rows)
    ]
    measure = next((name for name in ("mean_iou", "top1") if epochs and f"val_{name}" in epochs[0]), None)
    best = max(epochs, key=lambda line: line[f"val_{measure}"]) if measure else None
    figure = Figure(figsize=(4.5 * len(shown), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        scale, drawn = 1 if name == "loss" else 100, list[float]()
        for key, colour, what in ((f"{trained}{name}", "#8a99ad", "training"), (f"val_{name}", "#2b6cb0", "evaluation")):
            points = [(line["epoch"] + 1 if epochs else line["step"], scale * line[key]) for line in rows if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=what, marker="." if len(points) < 30 else None)
                drawn += [y for _, y in points]
        axes.set_title(TITLES[name], loc="left", fontsize=10)
        if name == "loss" and (top := top_of(drawn)) < max(drawn):
            axes.set_title(f"{TITLES[name]}   (highest: {max(drawn):.3g})", loc="left", fontsize=10)
            axes.set_ylim(0, top)
        if best is not None:
            axes.axvline(best["epoch"] + 1, color="#2f855a", linestyle=":", linewidth=1)
            if name == measure:
                at = (best["epoch"] + 1, scale * best[f"val_{name}"])
                axes.plot(*at, "o", color="#2f855a", label=f"best: {at[1]:.1f} in epoch {at[0]}")
        axes.set_xlabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    atomically(path, lambda temporary: temporary.write_bytes(image.getvalue()))


def top_of(values: Sequence[float]) -> float:
    """Return the highest value that a chart shows: few that are far above the others leave it."""
    highest = max(values, default=0.0)
    return min(highest, FAR * sorted(values)[3 * len(values) // 4]) if len(values) >= 4 else highest
