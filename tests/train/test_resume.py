"""A run that is killed, stopped, starved of disk or damaged goes on to the last bit: real processes, real faults."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks

from repvgg.data import open_source
from repvgg.disk import FileError
from repvgg.models.load import load
from repvgg.train.loop import Run, train
from repvgg.train.recipes import Keeping, get_recipe

QUICK = replace(get_recipe("demo"), epochs=3, batch_size=16, warmup_epochs=0, mixup=0.2, ema=0.9, erasing=0.2)
WORDS = (
    "train --no-report --arch repvgg_micro --width 0.25 --data digits --limit 128 --epochs 3 --batch-size 16 --mixup 0.2 --ema 0.9 "
    "--erasing 0.2 --warmup-epochs 0 --recipe demo --device cpu --save-steps 3 --workers 2 --out"
)


def quick(out: Path, recipe: Any = QUICK, said: list[str] | None = None, **options: Any) -> Run:
    source = open_source("digits").limited(128)
    log = said.append if said is not None else str
    return train("repvgg_micro", source, recipe, out, log=log, width=0.25, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": t for name in ("best", "last") for key, t in load(out / f"{name}.safetensors").state_dict().items()}


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(t, y[name]) for name, t in x.items())


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 steps, 8 an epoch."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    quick(out)
    return out


@pytest.mark.parametrize("places", [(9,), pytest.param((3, 9, 15), marks=pytest.mark.slow)])  # the first proves the point
def test_a_run_that_is_killed_ends_with_the_same_weights(
    undisturbed: Path, tmp_path: Path, places: tuple[int, ...], forks: Forks
) -> None:
    """SIGKILL, mid-epoch, with 2 loader workers (what is erased is read one by one); each time the same command goes on."""
    wait_for = random.Random(0)
    words = [*WORDS.split(), str(tmp_path / "run")]
    for after in places:  # a state is saved every third step
        with forks.start(words, tmp_path) as process:
            while not any(int(p.stem) >= after for p in (tmp_path / "run" / "state").glob("[0-9]*.safetensors")):
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.005)
            time.sleep(wait_for.uniform(0, 0.05))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = forks(words, tmp_path)
    assert done.code == 0, done.err
    assert "goes on after step" in done.err
    assert same(tmp_path / "run", undisturbed)
    resumed = [line["resumed_from"] for line in lines(tmp_path / "run") if "resumed_from" in line]
    assert resumed
    assert min(resumed) > 0
    steps = [line["step"] for line in lines(tmp_path / "run") if "val_top1" in line]
    assert steps == [8, 16, 24]


def test_an_end_between_the_last_step_and_its_evaluation(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repvgg.train.session import Session

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path, keeping=Keeping(save_steps=1))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["000000007.safetensors", "000000008.safetensors"]
    quick(tmp_path)
    assert same(tmp_path, undisturbed)


def test_a_damaged_state_gives_way_to_the_one_before(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    last = out / "state/000000024.safetensors"
    last.write_bytes(last.read_bytes()[:-1000])
    said: list[str] = []
    run = quick(out, said=said)
    assert any(line.startswith(f"{last}: damaged, it is left out") for line in said)
    assert any("goes on after step 16 of 24" in line for line in said)
    assert same(out, undisturbed)
    assert [line for line in run.history if "resumed_from" in line] == [{"step": 16, "resumed_from": 16}]


def test_a_finished_run_is_finished(undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    said: list[str] = []
    run = quick(undisturbed, said=said)
    assert any("has had its 3 epochs already" in line for line in said)
    assert run.last.top1 == json.loads((undisturbed / "summary.json").read_text())["last_top1"]
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()} == before
    kept = weights(undisturbed)
    assert all(torch.equal(t, kept[f"last.{name}"]) for name, t in run.model.state_dict().items())


def test_another_run_in_the_folder_is_refused_unless_allowed_by_name(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for options, complaint in (
        ({"recipe": replace(QUICK, lr=0.05)}, r"holds a run with lr 0.1, not 0.05: another --out, or --allow-change lr"),
        ({"seed": 1}, "holds a run with seed 0, not 1"),
        ({"recipe": replace(QUICK, epochs=4)}, "holds a run with epochs 3, not 4"),
    ):
        with pytest.raises(ValueError, match=complaint) as caught:
            quick(out, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--allow-change nope: there are arch, data"):
        quick(out, keeping=Keeping(allow_change="nope"))
    assert same(out, undisturbed)
    run = quick(out, replace(QUICK, epochs=4), keeping=Keeping(allow_change="epochs"))
    assert [line["step"] for line in run.history if "val_top1" in line] == [8, 16, 24, 32]
    assert json.loads((out / "summary.json").read_text())["last_top1"] == run.last.top1
    assert json.loads((out / "recipe.json").read_text())["epochs"] == 4


def test_what_no_run_can_change(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    with pytest.raises(ValueError, match="an epoch had 8 steps, now it has 4: a run cannot change that"):
        quick(out, replace(QUICK, batch_size=32), keeping=Keeping(allow_change="batch_size"))
    source = open_source("digits").limited(128)
    with pytest.raises(FileError, match="the state in it is of another network"):
        train("repvgg_micro", source, QUICK, out, width=0.5, log=str, keeping=Keeping(allow_change="width"))
    assert same(out, undisturbed)


def test_never_resume_starts_over(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / "bad_images.txt").write_text("of the run before\n")
    run = quick(out, replace(QUICK, epochs=1), keeping=Keeping(resume="never", on_bad_image="skip"))
    assert [line["step"] for line in run.history if "val_top1" in line] == [8]
    assert [p.name for p in (out / "state").iterdir()] == ["000000008.safetensors"]
    assert json.loads((out / "summary.json").read_text())["bad_images"] == 0


@pytest.mark.parametrize("emptied", [False, True])
def test_models_without_a_state_are_not_overwritten(emptied: bool, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "state")
    if emptied:
        (out / "state").mkdir()
    with pytest.raises(FileError, match=r"holds best\.safetensors but no state to go on from: another --out, or --resume never"):
        quick(out)
    assert same(out, undisturbed)


def test_a_run_that_was_killed_before_its_first_state_begins_anew(undisturbed: Path, tmp_path: Path) -> None:
    """Its models are written before the state is."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out, ignore=shutil.ignore_patterns("summary.json", "*[0-9].safetensors"))
    assert (out / "state").is_dir()
    assert (out / "last.safetensors").exists()
    quick(out)
    assert same(out, undisturbed)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_ends_the_run_and_leaves_the_last_state(undisturbed: Path, tmp_path: Path, forks: Forks) -> None:
    """A tmpfs that has room for the models and one state, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    room = sum(p.stat().st_size for p in (undisturbed / "state").glob("*24.safetensors")) * 5 // 2 + (1 << 17)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        done = forks([*WORDS.split(), str(disk / "run"), "--workers", "0"], tmp_path)
        assert done.code == 2, done.err
        complaint = [line for line in done.err.splitlines() if line.startswith("repvgg:")]
        assert len(complaint) == 1
        assert "No space left on device" in complaint[0] or "no space left" in complaint[0]
        assert "Traceback" not in done.err
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    said: list[str] = []
    quick(tmp_path / "run", said=said)
    assert any("goes on after step" in line for line in said)
    assert same(tmp_path / "run", undisturbed)


def test_a_loss_that_is_no_number_keeps_the_last_good_state(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repvgg.train.trainer import Trainer

    def poisoned(self: Trainer, parts: Any, *rest: Any) -> None:
        number = rest[1]
        step(self, [(x * float("nan"), y) for x, y in parts] if number == 10 else parts, *rest)

    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", poisoned)
        with pytest.raises(FloatingPointError, match=r"steps 9 to 16: the loss is nan: training diverged|holds NaN"):
            quick(tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["000000008.safetensors"]
    quick(tmp_path)
    assert same(tmp_path, undisturbed)
