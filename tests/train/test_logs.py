"""train/logs.py: lines, events and a curve, of a run that goes on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from repvgg.train.logs import Logs, draw_curve, read_lines


def test_a_resumed_run_forgets_what_will_come_again(tmp_path: Path) -> None:
    with Logs(tmp_path) as logs:
        for step in (10, 20, 30):
            logs.write(step=step, epoch=0, loss=1 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    with Logs(tmp_path, step=20) as logs:
        logs.write(step=30, epoch=0, loss=0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("resumed_from"), line.get("loss")) for line in lines] == [
        (10, None, 0.1),
        (20, None, 0.05),
        (20, 20, None),
        (30, None, 0.5),
    ]
    assert read_lines(tmp_path / "metrics.jsonl") == lines
    with Logs(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # a new run


def test_tensorboard_reads_its_events(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Logs(tmp_path) as logs:
        logs.write(step=10, epoch=0, loss=0.5, top1=0.25)
        logs.write(step=20, epoch=1, loss=0.25, top1=0.5)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss", "top1"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]


def test_tensorboard_forgets_what_came_again(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps in ((0, (5, 10, 50)), (0, (10, 20, 30)), (20, (30, 40))):  # the second starts over: with --resume never
        with Logs(tmp_path, step=first) as logs:
            for step in steps:
                logs.write(step=step, epoch=0, loss=step + first)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_a_tensorboard_that_does_not_load_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    said: list[str] = []
    with Logs(tmp_path, log=said.append) as logs:
        logs.write(step=10, epoch=0, loss=0.5)
    (line,) = said
    assert line.startswith("without TensorBoard, which does not load (ModuleNotFoundError): pip install")
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 10, "epoch": 0, "loss": 0.5}]


def test_what_cannot_be_written_is_told_once_and_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is gone, as one is on a disk that was taken away."""
    pytest.importorskip("tensorboard")
    said: list[str] = []
    with Logs(tmp_path, log=said.append) as logs:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(logs.board, "add_scalar", full)
        assert logs.board is not None
        logs.board.close()
        monkeypatch.setattr(logs.board, "close", full)
        logs.path = tmp_path / "gone" / "metrics.jsonl"
        for step in (10, 20):
            logs.write(step=step, epoch=0, loss=0.5)
    assert len(said) == 2
    assert all(line.endswith("; training goes on") and "cannot be written (" in line for line in said)


def test_weights_and_biases_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append(("finish",)))

    def init(**options: Any) -> SimpleNamespace:
        calls.append((options["project"], options["config"]))
        return run

    client = SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", client)
    with Logs(tmp_path, wandb="birds", settings={"lr": 0.1}) as logs:
        logs.write(step=10, epoch=0, loss=0.5)
    assert calls == [("birds", {"lr": 0.1}), ({"loss": 0.5}, 10), ("finish",)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb needs wandb: pip install wandb"):
        Logs(tmp_path, wandb="birds")


def test_each_run_has_an_id_of_its_own_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders may share a name; and Weights & Biases drops steps that a run has had already."""
    ids: list[str] = []

    def init(**options: Any) -> SimpleNamespace:
        ids.append(options["id"])
        return SimpleNamespace(finish=lambda: None, log=lambda values, step: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    here, there = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for out, step in ((here, 0), (here, 20), (there, 0), (here, 0)):  # the last as with --resume never
        out.mkdir(parents=True, exist_ok=True)
        with Logs(out, step, wandb="birds"):
            pass
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for epoch in range(3):
        lines.append({"step": 20 * epoch + 10, "epoch": epoch, "loss": 2.0 - epoch / 2, "top1": epoch / 3})
        figures = {"train_loss": 2.0 - epoch / 2, "train_top1": epoch / 3, "val_loss": 2.1 - epoch / 2, "val_top1": epoch / 3}
        lines.append({"step": 20 * (epoch + 1), "epoch": epoch, **figures})
    for some in (lines, lines[:1]):  # and of a run that was stopped in its first epoch
        draw_curve(some, tmp_path / "curve.png")
        with Image.open(tmp_path / "curve.png") as image:
            assert image.size[0] > 1000
            assert len(image.convert("RGB").getcolors(100_000) or []) > 10
    before = (tmp_path / "curve.png").read_bytes()
    draw_curve([{**line, "loss": 9.0} for line in lines[1:2]], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() != before
    draw_curve([], tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
