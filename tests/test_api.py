"""api.py: the verbs in Python, on a folder of photos that is divided by itself."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import repvgg
from repvgg.api import opening, training, using
from repvgg.api.files import stem_of
from repvgg.data import open_source
from repvgg.data.images import ImageError
from repvgg.models.zoo import manifest_of
from repvgg.predict.labels import predict as labels
from repvgg.train import distributed, loop
from repvgg.train.recipes import Keeping, Recipe

ONE = Recipe(epochs=1, batch_size=8, lr=0.02, crop="shift")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten light and ten dark pictures of 40 pixels."""
    root = tmp_path_factory.mktemp("photos")
    random = torch.Generator().manual_seed(0)
    for name, least in (("dark", 0), ("light", 150)):
        (root / name).mkdir()
        for i in range(20):
            noise = torch.randint(least, least + 100, (40, 44, 3), generator=random, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "run"
    said: list[str] = []
    how: dict[str, Any] = {"val": 0.25, "seed": 3, "width": 0.25, "image_size": 32, "epochs": 3, "init": "none", "report": False}
    how["log"] = said.append
    run = repvgg.train("repvgg_micro", str(photos), out, **how)
    return run, out, said, how


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/a/best.safetensors", "best"),
        ("a/net.pth", "net"),
        ("runs/lr0.1", "lr0.1"),
        ("hf:me/net@v1.0", "net@v1.0"),
        ("repvgg_a0", "repvgg_a0"),
        (torch.nn.Identity(), "model"),
        (".", Path.cwd().name),
    ],
)
def test_what_files_made_of_a_model_are_called(model: Any, name: str) -> None:
    assert stem_of(model) == name


def test_rooms_are_verbs_too() -> None:
    for verb, function in ((repvgg.train, training.train), (repvgg.predict, using.predict)):
        assert inspect.ismodule(verb)
        assert inspect.signature(verb) == inspect.signature(function)


@pytest.mark.slow
def test_rooms_are_verbs_whatever_is_imported_first() -> None:
    code = "import repvgg.predict.rows, repvgg; import repvgg.train.recipes as r; assert callable(repvgg.predict); "
    subprocess.run([sys.executable, "-c", code + "assert callable(repvgg.train); assert repvgg.train.recipes is r"], check=True)


def test_train_says_what_it_chose_and_why(trained: Any) -> None:
    run, out, said, _ = trained
    assert str(run).startswith("best val top-1 ")
    assert str(run).endswith(f" min: {out}")
    auto = [line for line in said if line.startswith("auto: ")]
    assert (
        auto[0] == "auto: 30 images to train on in 2 classes, their short sides about 40 pixels; new weights, as --init none says"
    )
    assert re.fullmatch(r"auto: a training step here takes so many images a second at 32 pixels: \d+ in fp32, \d+ in bf16", auto[1])
    assert re.match(
        r"auto: 200 epochs in batches of 32 at 32 pixels in (fp32|bf16), learning rate 0.05, random shifts: about", auto[2]
    )
    assert auto[3].startswith("auto: instead: --epochs 100: ")
    assert auto[4] == "auto: but as given, epochs 3"
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["image_size"], recipe["batch_size"]) == (3, 32, 32)
    manifest = manifest_of(repvgg.load(out))
    assert manifest.preprocessing.input_size == (3, 32, 32)
    assert manifest.training["splitting"] == [0.25, 3]


def test_the_same_call_finds_it_finished_whatever_became_of_the_folder(trained: Any, photos: Path) -> None:
    run, out, said, how = trained
    said.clear()
    Image.new("RGB", (40, 40)).save(photos / "dark" / "new.png")
    try:
        again = repvgg.train("repvgg_micro", str(photos), out, **how)
    finally:
        (photos / "dark" / "new.png").unlink()
    assert said[0] == f"recipe: {out} has one already"
    assert said[-1] == f"{out}: has had its 3 epochs already"
    assert again.best.confusion.tolist() == run.best.confusion.tolist()


def test_evaluation_is_of_the_images_that_were_held_out(trained: Any, photos: Path, tmp_path: Path) -> None:
    run, out, _, _ = trained
    deploy = repvgg.reparameterize(run.model)
    repvgg.save(deploy, tmp_path / "deploy.safetensors")
    found: list[Any] = [repvgg.evaluate(m, str(photos)) for m in (out, tmp_path / "deploy.safetensors", run.model)]
    assert {(accuracy.images, accuracy.classes) for accuracy in found} == {(10, ("dark", "light"))}
    assert torch.equal(found[0].confusion, run.best.confusion)
    assert torch.equal(found[1].confusion, found[2].confusion)
    with pytest.raises(ValueError, match="--precision bf16 is an engine's"):
        repvgg.evaluate(run.model, str(photos), precision="bf16")


def test_data_are_divided_as_when_the_model_was_trained(trained: Any, photos: Path) -> None:
    """With another seed, most images of the validation split would be those that it has seen."""
    run, _, _, _ = trained
    said: list[str] = []
    for val, seed in ((None, 0), (0.25, 0), (0.25, 1)):
        assert opening.open_data(str(photos), val, seed=seed, model=run.model, log=said.append).splitting == (0.25, 3)
    assert not said
    other: Any = repvgg.evaluate(run.model, str(photos), val=0.5, log=said.append)
    assert other.images == 20
    assert said == [f"{photos}: --val 0.5 is not how the model's images were divided (0.25): it has seen some of these"]


def test_classes_of_other_names_are_told(trained: Any, photos: Path, tmp_path: Path) -> None:
    run, said = trained[0], list[str]()
    (tmp_path / "n1").symlink_to(photos / "dark")
    (tmp_path / "n2").symlink_to(photos / "light")
    other: Any = repvgg.evaluate(run.model, str(tmp_path), log=said.append)
    assert other.classes == ("n1", "n2")
    assert said == [f"{tmp_path}: classes are taken by their numbers: the model's 'dark' is 'n1', the model's 'light' is 'n2'"]


def test_images_that_cannot_be_read_keep_neither_the_page_nor_an_evaluation(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    data, said = str(tmp_path / "photos"), list[str]()
    rows = open_source(data).rows
    assert rows is not None
    for split in ("train", "val"):
        bad = next(tmp_path / "photos" / name for name, _, part in rows() if part == split)
        bad.write_bytes(b"damaged")
    how: dict[str, Any] = {"recipe": ONE, "width": 0.25, "image_size": 32, "keeping": Keeping(on_bad_image="skip")}
    run = repvgg.train("repvgg_micro", data, tmp_path / "run", log=said.append, **how)
    assert said[-1].startswith(f"{tmp_path / 'run/run.html'}: curves")
    assert "Of 8 validation images" in (tmp_path / "run/run.html").read_text()
    with pytest.raises(ImageError, match=f"^{bad}: not an image"):
        repvgg.evaluate(run.model, data)
    said.clear()
    found: Any = repvgg.evaluate(run.model, data, on_bad_image="skip", log=said.append)
    assert found.images == 7
    assert torch.equal(found.confusion, run.best.confusion)
    (line,) = said
    assert line.startswith(f"left out: {bad}: not an image")


def test_predict(trained: Any, photos: Path) -> None:
    run, out, _, _ = trained
    found = repvgg.predict(out, [str(photos / "light" / "0.png"), str(photos / "dark")], top=1)
    assert len(found) == 21
    assert {type(answer).__name__ for answer in found} == {"Prediction"}
    paths = [str(photos / "light" / "0.png"), str(photos / "dark")]
    wanted = list(labels(repvgg.reparameterize(repvgg.load(out)), paths, top=1))
    assert [answer.path for answer in found] == [answer.path for answer in wanted]
    assert [answer.labels[0][0] for answer in found] == [answer.labels[0][0] for answer in wanted]  # type: ignore[union-attr]
    shares = [[answer.labels[0][1] for answer in answers] for answers in (found, wanted)]  # type: ignore[union-attr]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert max(shares[1]) - min(shares[1]) > 0.01  # an answer is that of its own image
    again = repvgg.predict(run.model, photos / "light" / "0.png")
    assert len(again[0].labels) == 2  # type: ignore[union-attr]


def test_export(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    _, out, _, _ = trained
    exported = repvgg.export(out, ("ncnn", "pt2"), tmp_path, log=lambda line: None)
    assert [(e.path.name, e.format) for e in exported] == [(f"{out.name}.ncnn.param", "ncnn"), (f"{out.name}.pt2", "pt2")]
    assert all(0 <= e.max_rel_err < 1e-3 and str(e).startswith(str(e.path)) for e in exported)
    assert exported[0].report["labels"] == ["dark", "light"]


def test_prune_and_quantize(trained: Any, photos: Path, tmp_path: Path) -> None:
    _, out, _, _ = trained
    with pytest.raises(ValueError, match="--recipe auto is for train alone"):
        repvgg.prune(out, str(photos), tmp_path / "auto", recipe="auto")
    silent: dict[str, Any] = {"log": lambda line: None}
    pruned = repvgg.prune(out, str(photos), tmp_path / "pruned", 0.5, recipe=ONE, **silent)
    assert pruned.costs[1].params < pruned.costs[0].params
    assert "top-1" in str(pruned)
    pytest.importorskip("nncf")
    pytest.importorskip("onnxruntime")
    rounded = repvgg.quantize(out, str(photos), "onnx", tmp_path / "int8", limit=8, **silent)
    assert rounded.path.exists()
    assert rounded.before.images == 8
    assert "INT8" in str(rounded)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"arch": "", "init": "none"}, "which model\\? --arch NAME"),
        ({"arch": "", "init": ""}, "which model\\? --arch NAME"),
        ({"epoch": 3}, "a recipe has no epoch: did you mean epochs\\?"),
        ({"epochs": "3"}, "epochs is '3': int is needed"),
        ({"recipe": "nowhere.json"}, "nowhere.json: no recipe can be read"),
        ({"minutes": 0.0}, "--minutes 0: above 0"),
        ({"minutes": 5.0, "recipe": "light"}, "--minutes 5 is for --recipe auto only"),
        ({"device": "tpu"}, "no device 'tpu' here"),
        ({"image_size": -1}, "image_size is -1: not negative"),
        ({"val": 2.0}, "--val 2.0: a fraction"),
    ],
)
def test_train_refuses(how: dict[str, Any], complaint: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        repvgg.train(**{"arch": "repvgg_micro", "data": str(photos), "out": tmp_path / "x", "log": lambda line: None, **how})
    assert not (tmp_path / "x").exists()


def test_a_recipe_of_ones_own(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(
        json.dumps({"epochs": 1, "batch_size": 16, "image_size": 32, "optimizer": "adamw", "lr": 1e-3})
    )
    silent: dict[str, Any] = {"width": 0.25, "report": False, "log": lambda line: None}
    run = repvgg.train("repvgg_micro", str(photos), tmp_path / "a", recipe=tmp_path / "mine.json", limit=16, **silent)
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert (recipe["optimizer"], recipe["epochs"], run.last.images) == ("adamw", 1, 8)
    source = replace(open_source(str(photos)), recipe="demo")
    other = repvgg.train("repvgg_micro", source, tmp_path / "b", limit=16, epochs=1, image_size=32, **silent)
    assert json.loads((tmp_path / "b" / "recipe.json").read_text())["crop"] == "shift"
    assert other.last.images == 8


def test_new_weights_are_not_fine_tuned(tmp_path: Path) -> None:
    """Of data that have a recipe of their own; `auto` is told in test_train_says_what_it_chose_and_why."""
    said: list[str] = []
    how: dict[str, Any] = {"width": 0.25, "report": False, "epochs": 1, "limit": 64, "log": said.append}
    repvgg.train("repvgg_micro", "digits", tmp_path, init="none", **how)
    assert said[0] == "recipe: demo"


def test_of_many_processes_one_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vars(loop)["joined"] is distributed.joined  # which what is below has: it trains alone
    monkeypatch.setattr(distributed, "joined", lambda device: nullcontext(distributed.World(rank=1)))
    said: list[str] = []
    how: dict[str, Any] = {"width": 0.25, "report": False, "epochs": 1, "limit": 64, "log": said.append}
    repvgg.train("repvgg_micro", "digits", tmp_path, **how)
    assert not any(line.startswith("recipe: ") for line in said)


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that holds no run; and where what draws the page is not installed."""
    from repvgg.api.training import report_at_the_end

    said: list[str] = []
    report_at_the_end(tmp_path, open_source("digits"), "cpu", said.append)
    with monkeypatch.context() as broken:
        broken.setattr("repvgg.web.report.write_report", lambda *args, **options: [][0])
        report_at_the_end(tmp_path, open_source("digits"), "cpu", said.append)
    monkeypatch.delitem(sys.modules, "repvgg.web.report", raising=False)
    monkeypatch.delitem(sys.modules, "repvgg.web.charts", raising=False)
    monkeypatch.delattr("repvgg.web.charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    report_at_the_end(tmp_path, open_source("digits"), "cpu", said.append)
    assert [line.partition(" (")[0].partition(",")[0] for line in said] == [f"{tmp_path}: without a page"] * 3
    assert "pip install matplotlib" in said[2]
