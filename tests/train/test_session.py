"""train/session.py: everything that can go wrong in a run, on real data and in real processes."""

import json
import os
import re
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from PIL import Image
from rounding import REPORTED
from small_runs import QUICK, quick, same
from torch import nn

from repvgg.data import Decoded, open_source
from repvgg.data.images import ImageError
from repvgg.disk import FileError
from repvgg.fold.proof import verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import load
from repvgg.models.manifest import Preprocessing
from repvgg.models.repvgg import RepVGG
from repvgg.train import loop
from repvgg.train.evaluate import evaluate_model
from repvgg.train.loop import Run, new_model, train
from repvgg.train.recipes import Keeping, Recipe


class Cliff(Recipe):
    """Sound for half of the run, then off a cliff."""

    def lr_at(self, progress: float) -> float:
        return 0.05 if progress < 0.5 else 1e30


def test_a_diverging_run_stops_and_keeps_the_last_saved_model(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"training diverged, lower --lr\. What was saved before is intact") as caught:
        quick(tmp_path, Cliff(**{**asdict(QUICK), "epochs": 4}))
    assert "\n" not in str(caught.value)
    for name in ("last", "best"):
        assert evaluate_model(load(tmp_path / f"{name}.safetensors"), open_source("digits")).loss < 10
    assert not list(tmp_path.glob(".*"))


def test_it_ends_where_no_epoch_is_better_and_stays_ended(tmp_path: Path) -> None:
    """With a learning rate that moves nothing the first epoch is the best."""
    recipe = replace(QUICK, epochs=9, lr=1e-12, early_stop=2, freeze_bn=True)
    run = quick(tmp_path, recipe)
    assert len([line for line in run.history if "val_top1" in line]) == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["epochs"], summary["best_epoch"], summary["finished"]) == (3, 1, True)
    again = quick(tmp_path, recipe)
    assert again.history == run.history
    assert same(run, again)


def test_early_evaluations_are_of_the_weights_as_they_are(tmp_path: Path) -> None:
    """After two steps the running means are mostly what they began as: chance, and a loss of any size."""
    run = quick(tmp_path, replace(QUICK, epochs=2, batch_size=48, lr=0.02))
    first = next(line for line in run.history if "val_loss" in line)
    assert first["val_loss"] < 2 * first["train_loss"]


def test_a_huge_learning_rate_from_the_start_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="training diverged"):
        quick(tmp_path, replace(QUICK, lr=1e30, epochs=20))
    assert not list(tmp_path.glob("*.safetensors"))


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss may stay finite while a running variance is not: the output is divided by it."""

    def poisoned(*args: Any, **options: Any) -> nn.Module:
        model = new_model(*args, **options)
        model.get_buffer("stages.0.0.block.conv_kxk.bn.running_var").fill_(float("inf"))
        return model

    monkeypatch.setattr(loop, "new_model", poisoned)
    with pytest.raises(FloatingPointError, match=r"stages.0.0.block.conv_kxk.bn.running_var holds NaN or Inf: training diverged"):
        quick(tmp_path, replace(QUICK, freeze_bn=True))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_channel_that_is_constant_throughout_still_gives_a_file_that_loads_and_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black images: every channel of the stem is constant, and with a momentum of 1 its running variance is exactly zero."""

    def hasty(*args: Any, **options: Any) -> nn.Module:
        model = new_model(*args, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        return model

    monkeypatch.setattr(loop, "new_model", hasty)
    digits = open_source("digits")
    black = Decoded(torch.zeros(32, 1, 16, 16, dtype=torch.uint8), [i % 10 for i in range(32)])
    source = replace(digits, train=black, val=black, preprocessing=replace(digits.preprocessing, mean=(0.0,)))
    run = train("repvgg_micro", source, QUICK, tmp_path, log=lambda line: None, width=0.25)
    model = load(tmp_path / "last.safetensors")
    assert isinstance(model, RepVGG)
    variance = model.get_buffer("stem.block.conv_kxk.bn.running_var")
    assert not variance.any()
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    deploy = reparameterize(model)
    assert verify(model, deploy, (1, 16, 16)).max_rel_err < REPORTED


def test_bad_settings_leave_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no block 'nope': there are repvgg"):
        quick(out, block="nope")
    with pytest.raises(ValueError, match="width"):
        quick(out, width=0.0)
    with pytest.raises(ValueError, match="no model 'repvgg_z9'"):
        train("repvgg_z9", open_source("digits"), QUICK, out)
    with pytest.raises(ValueError, match="resnet18 takes no width"):
        train("resnet18", open_source("digits"), QUICK, out, width=0.5)
    one = replace(open_source("digits"), classes=["digit"])
    with pytest.raises(ValueError, match="digits: has one class, 'digit'; there is nothing to tell apart"):
        train("repvgg_micro", one, QUICK, out)
    assert not out.exists()


def test_a_run_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(FileError, match=f"{out}: cannot be a run folder"):
            quick(out)
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ValueError, match="a run is in a folder, which --mirror copies to an object store"):
        quick(Path("s3://bucket/run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_training_is_named(workers: int, tmp_path: Path) -> None:
    for path in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / path)
    bad = tmp_path / "train/b/2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    source = replace(open_source(str(tmp_path)), preprocessing=Preprocessing((3, 32, 32), 32))
    with pytest.raises(ImageError, match=f"^{bad}: not an image, or a damaged one"):
        train("repvgg_micro", source, QUICK, tmp_path / "run", workers=workers, log=lambda line: None, width=0.25)


def test_at_an_unreadable_image_the_state_is_saved_first(tmp_path: Path) -> None:
    """The image comes back, and the run ends as if nothing had been."""
    for number in range(8):
        for split in ("train", "val"):
            path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 10 * number + 5).convert("RGB").save(path)
    data, recipe = str(tmp_path / "data"), replace(QUICK, batch_size=2, epochs=1)

    def run(out: str) -> Run:
        source = replace(open_source(data), preprocessing=Preprocessing((3, 32, 32), 32))
        return train("repvgg_micro", source, recipe, tmp_path / out, log=lambda line: None, width=0.25)

    whole = run("whole")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()  # of seed 0, epoch 0
    bad = tmp_path / "data/train" / open_source(data).train.names[order[5]]  # type: ignore[attr-defined]  # in the third step
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(ImageError, match=f"^{bad}"):
        run("run")
    assert [path.name for path in (tmp_path / "run/state").iterdir()] == ["000000002.safetensors"]
    bad.write_bytes(good)
    assert same(run("run"), whole)


ENDLESS = "train --arch repvgg_micro --width 0.25 --data digits --limit 256 --epochs 100000 --device cpu --out"


def test_a_second_process_is_told_which_one_works_in_the_folder(tmp_path: Path, forks: Forks) -> None:
    with forks.start([*ENDLESS.split(), str(tmp_path)], tmp_path) as process:
        while "epoch 1/" not in process.said():
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(FileError, match=f"process {process.pid} on .* works in it"):
            quick(tmp_path)
        lines = (tmp_path / "metrics.jsonl").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert "resumed_from" not in lines
    quick(tmp_path, keeping=Keeping(resume="never"))  # the dead one's lock does not stand in the way


def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repvgg.train.trainer import Trainer

    def greedy(self: Trainer, *_: object) -> None:
        torch.empty(2**55)

    monkeypatch.setattr(Trainer, "step", greedy)
    with pytest.raises(ValueError, match="out of memory on cpu with 32 images at a time: --accumulate 2 takes half as many"):
        quick(tmp_path)


OTHERS = [pytest.param(*other, marks=pytest.mark.slow) for other in ((signal.SIGINT, 130), (signal.SIGHUP, 129))]  # test_signals.py


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), *OTHERS])
def test_stopping_a_run_leaves_the_last_saved_model_whole(sent: signal.Signals, code: int, tmp_path: Path, forks: Forks) -> None:
    with forks.start([*ENDLESS.split(), str(tmp_path)], tmp_path) as process:
        while "epoch 2/" not in process.said():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)  # somewhere in an epoch
        os.kill(process.pid, sent)
        ended = process.wait()
    assert ended.code == code
    remarks = [line for line in ended.err.splitlines() if line.startswith("repvgg: ")]
    assert len(remarks) == 1
    assert (found := re.fullmatch(r"repvgg: stopped after step (\d+), and saved: the same command goes on", remarks[0]))
    assert (tmp_path / f"state/{int(found[1]):09d}.safetensors").exists()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = load(tmp_path / "last.safetensors")
    recorded = {line["epoch"] + 1: line["val_top1"] for line in metrics if "val_top1" in line}
    training = zoo.manifest_of(last).training
    assert recorded[training["epoch"]] == training["val_top1"]
    assert evaluate_model(last, open_source("digits").limited(256)).top1 == training["val_top1"]
