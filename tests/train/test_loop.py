"""train/loop.py: real training on the digits. What goes wrong is in test_session.py."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error_of_deviation
from rounding import rounding
from small_runs import DEMO, QUICK, quick, same, state
from torch import Tensor

from repvgg.data import DataError, Decoded, Source, open_source
from repvgg.data.transforms import Transformed, eval_transform, normalise
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import load
from repvgg.models.manifest import Preprocessing
from repvgg.train.evaluate import evaluate_model
from repvgg.train.loop import Run, new_model, refuse, train
from repvgg.train.recipes import Recipe
from repvgg.train.trainer import Trainer

# --------------------------------------------------------------------------------------------------------- a whole run, once


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Half of repvgg_micro on all digits: what most tests below look at."""
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    run = train("repvgg_micro", open_source("digits"), replace(DEMO, epochs=4), out, log=lambda line: None, width=0.5)
    return run, out


def test_it_learns(trained: tuple[Run, Path]) -> None:
    run, _ = trained
    assert run.last.images == 360
    assert run.last.top1 >= 0.9
    assert run.best.top1 >= run.last.top1
    assert not run.model.training


def test_the_run_folder(trained: tuple[Run, Path]) -> None:
    run, out = trained
    files = {"best.safetensors", "last.safetensors", "recipe.json", "settings.json", "metrics.jsonl"}
    files |= {"summary.json", "state", "curve.png"}
    events = {path.name for path in out.glob("events.out.tfevents.*")}
    assert len(events) == 1
    assert {path.name for path in out.iterdir()} == files | events
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["arch"], summary["data"], summary["seed"]) == ("repvgg_micro", "digits", 0)
    assert (summary["best_top1"], summary["last_top1"], summary["seconds"]) == (run.best.top1, run.last.top1, run.seconds)
    assert "processor" in summary["machine"]
    assert Recipe(**json.loads((out / "recipe.json").read_text())) == replace(DEMO, epochs=4)


def test_metrics_are_json_lines(trained: tuple[Run, Path]) -> None:
    run, out = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.history
    steps = [line for line in lines if "loss" in line]
    epochs = [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in steps] == [20, 40, 60, 80]  # 1437 // 64 = 22 steps an epoch
    assert [(line["step"], line["epoch"]) for line in epochs] == [(22, 0), (44, 1), (66, 2), (88, 3)]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert epochs[-1] == {
        "step": 88,
        "epoch": 3,
        "seconds": epochs[-1]["seconds"],
        "train_loss": epochs[-1]["train_loss"],
        "train_top1": epochs[-1]["train_top1"],
        "val_loss": run.last.loss,
        "val_top1": run.last.top1,
        "val_top5": run.last.top5,
    }
    assert all(0 <= line["top1"] <= 1 and line["img_per_s"] > 0 for line in steps)


def test_saved_models_are_as_accurate_as_they_say(trained: tuple[Run, Path]) -> None:
    run, out = trained
    source = open_source("digits")
    for name, recorded in (("last", run.last), ("best", run.best)):
        model = load(out / f"{name}.safetensors")
        manifest = zoo.manifest_of(model)
        assert manifest.form == "training"
        assert manifest.classes == source.classes
        assert manifest.preprocessing == source.preprocessing
        assert manifest.training["val_top1"] == recorded.top1
        assert manifest.training["recipe"] == asdict(replace(DEMO, epochs=4))
        measured = evaluate_model(model, source)
        assert measured.top1 == recorded.top1
        assert torch.equal(measured.confusion, recorded.confusion)
        assert measured.loss == pytest.approx(recorded.loss, rel=1e-5)


def test_both_forms_read_every_held_out_scan_alike(trained: tuple[Run, Path]) -> None:
    _, out = trained
    source = open_source("digits")
    scans = Transformed(source.val, eval_transform(source.preprocessing))
    images = normalise(torch.stack([scans[i][0] for i in range(360)]), source.preprocessing)
    model = load(out / "last.safetensors")
    deploy = reparameterize(model)
    with torch.no_grad():
        a, b = model(images), deploy(images)
    assert torch.equal(a.argmax(1), b.argmax(1))
    assert error_of_deviation(b, a) <= rounding(model, images, error=error_of_deviation)


# ------------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_a_seed_gives_the_same_model_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (quick(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert same(first, again)
    assert not same(first, other)
    monkeypatch.setattr("repvgg.train.batches.only_shifts", lambda recipe: False)  # as photos are loaded, one by one
    assert same(quick(tmp_path / "d", seed=3), quick(tmp_path / "e", seed=3, workers=2))


def test_a_set_smaller_than_the_batch_makes_one_smaller_batch(tmp_path: Path) -> None:
    run = quick(tmp_path, DEMO, limit=20)
    assert [line["step"] for line in run.history] == list(range(1, DEMO.epochs + 1))
    assert run.last.images == 20
    with pytest.raises(DataError, match="--limit 0"):
        quick(tmp_path, limit=0)


def test_bf16_computes_in_bf16_and_keeps_fp32(tmp_path: Path) -> None:
    single, brain = quick(tmp_path / "a"), quick(tmp_path / "b", replace(QUICK, precision="bf16"))
    assert not same(single, brain)
    assert all(t.dtype == torch.float32 for t in state(brain).values() if t.is_floating_point())
    assert brain.last.loss == pytest.approx(single.last.loss, rel=0.2)


def test_a_new_model_fits_its_source() -> None:
    said: list[str] = []
    model = new_model("repvgg_micro", open_source("digits"), log=said.append)
    assert said == ["images of 16 x 16 pixels: small_input is on (stem and first stage at stride 1)"]
    arch = zoo.manifest_of(model).arch
    assert arch is not None
    assert (arch["num_classes"], arch["in_chans"], arch["small_input"]) == (10, 1, True)
    given = zoo.manifest_of(new_model("repvgg_micro", open_source("digits"), log=said.append, small_input=False)).arch
    assert given is not None
    assert given["small_input"] is False
    assert len(said) == 1
    large = Source("large", Decoded(torch.zeros(0), []), Decoded(torch.zeros(0), []), ["a", "b"], Preprocessing())
    photos = zoo.manifest_of(new_model("repvgg_micro", large, log=said.append)).arch
    assert photos is not None
    assert photos["small_input"] is False


def test_small_images_come_first_and_the_whole_ones_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on, evaluated_on = list[int](), list[int]()

    def step(self: Trainer, parts: Any, *more: Any) -> None:
        trained_on.extend(x.shape[-1] for x, _ in parts)
        real(self, parts, *more)

    def predict(self: Trainer, x: Tensor) -> Tensor:
        evaluated_on.append(x.shape[-1])
        return forward(self, x)

    real, forward = Trainer.step, Trainer.predict
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "predict", predict)
    quick(tmp_path, replace(QUICK, small_first=0.5))
    assert trained_on == [8] * 3 + [16] * 3
    assert {*evaluated_on} == {16}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "val_top1" in line]
    assert 0 < seconds[0] <= seconds[1]


@pytest.mark.parametrize("name", ["summary.json", "settings.json", "recipe.json", "split.csv"])
def test_a_folder_of_something_else_is_no_run_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileError, match=f"holds a {name} of something else, which would be lost"):
        refuse(open_source("digits"), tmp_path)
    (tmp_path / "state").mkdir()
    refuse(open_source("digits"), tmp_path)
    assert (tmp_path / name).read_text() == "mine"
