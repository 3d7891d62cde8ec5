"""train/progress.py: what is printed, and the figures in it, on a clock of our own."""

import sys
import time
from functools import partial

import pytest
import torch

from repvgg import terminal
from repvgg.train.evaluate import Accuracy
from repvgg.train.progress import Progress
from repvgg.train.recipes import Recipe

ACCURACY = Accuracy(360, 0.5, 0.9, 1.0, torch.zeros(10, 10))


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_figures_are_what_was_seen_last_and_speed_leaves_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), list[str]()
    with Progress(epochs=2, steps=60, batch_size=64, log=lines.append) as p:
        for _ in range(60):
            clock.now += 0.25
            p.step(0, 0.1, waited=0.05, loader=900.0)
        p.seen(34.5, 0.345)
        assert p.averages() == {
            "loss": 34.5,
            "top1": 0.345,
            "lr": 0.1,
            "img_per_s": 256.0,
            "loader_img_per_s": 900.0,
            "data_wait": 0.2,
        }
        clock.now += 1000
        p.evaluated(0, ACCURACY, (17.25, 0.29))
        clock.now += 0.25
        p.step(1, 0.05, 0.05, 900.0)
        assert p.averages()["img_per_s"] == 256
    figures = "val top-1 90.00% (360 images); in training top-1 29.0%, loss 17.250"
    assert lines == [f"epoch 1/2: {figures}, 256 img/s (loader 900, data wait 20%), lr 0.1000"]


def test_without_a_terminal_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), list[str]()
    with Progress(epochs=3, steps=100, batch_size=10, log=lines.append) as p:
        for step in range(100):
            clock.now += terminal.PLAIN_EVERY / 40
            p.step(0, 0.1, 0.0, 50.0)
            if step == 50:
                p.seen(2.0, 0.5)
    assert lines == [
        "about 4 min for the 290 steps that are left; evaluations come on top",
        "epoch 1/3  13 img/s (loader 50, data wait 0%)  lr 0.1000  step 51/300  3.1 min left",
        "epoch 1/3  loss 2.000  top-1 50.0%  13 img/s (loader 50, data wait 0%)  lr 0.1000  step 92/300  2.6 min left",
    ]


def test_in_a_terminal_a_live_line_and_the_epochs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    logged = list[str]()
    with Progress(epochs=1, steps=2, batch_size=8, log=logged.append) as p:
        p.step(0, 0.1)
        p.seen(1.5, 0.25)
        p.step(0, 0.1)
        p.evaluated(0, ACCURACY, (1.5, 0.25))
    shown = capsys.readouterr()
    assert "epoch 1/1: val top-1 90.00% (360 images); in training top-1 25.0%, loss 1.500" in shown.err
    assert "top-1 25.0%" in shown.err
    assert "2/2" in shown.err
    assert "\x1b[?25h" in shown.err  # the cursor is back
    assert shown.out == ""
    assert logged == []


def test_a_resumed_run_counts_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), list[str]()
    with Progress(epochs=2, steps=100, batch_size=10, log=lines.append, before=150) as p:
        p.evaluated(0, ACCURACY, (1.5, 0.25))  # of an epoch whose last step was an earlier process's
        for _ in range(21):
            clock.now += 3
            p.step(1, 0.1)
    assert lines == [
        "epoch 1/2: val top-1 90.00% (360 images); in training top-1 25.0%, loss 1.500",
        "about 2 min for the 40 steps that are left; evaluations come on top",
        "epoch 2/2  3 img/s (loader 0, data wait 0%)  lr 0.1000  step 171/200  1.5 min left",
    ]


def test_the_first_steps_are_slow_and_the_larger_images_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), list[str]()
    recipe = Recipe(small_first=0.5)  # at 3/4 of the side a step is 9/16 of the work
    with Progress(2, 100, 10, lines.append, left=partial(recipe.work_left, 32)) as p:
        for step in range(10):
            clock.now += 9.0 if step >= 5 else 100.0
            p.step(0, 0.1)
    assert lines[-1].startswith(f"about {(90 * 9 + 100 * 16) / 60:.0f} min for the 190 steps")
