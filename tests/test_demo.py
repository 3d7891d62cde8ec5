"""The demo as a user runs it: what it claims on its page is what its files do."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import repvgg
from repvgg import demo
from repvgg.data import open_source
from repvgg.disk import FileError
from repvgg.train.evaluate import evaluate_model


def test_leaves_a_trained_model_and_its_fold_that_agree(demo_folder: Path) -> None:
    source = open_source("digits")
    training, deploy = repvgg.load(demo_folder / "run" / "last.safetensors"), repvgg.load(demo_folder / "deploy.safetensors")
    assert repvgg.verify(training, deploy, source.preprocessing.input_size).ok
    accuracies = [evaluate_model(model, source) for model in (training, deploy)]
    assert accuracies[0].top1 > 0.9  # after half of its epochs
    assert torch.equal(accuracies[0].confusion, accuracies[1].confusion)


def test_figures_are_those_of_its_models(demo_folder: Path) -> None:
    figures = json.loads((demo_folder / "demo.json").read_text())
    source = open_source("digits")
    assert figures["top1"]["deploy form"] == evaluate_model(repvgg.load(demo_folder / "deploy.safetensors"), source).top1
    assert figures["same_predictions"]
    low, value, high = figures["speedup"][1], figures["speedup"][0], figures["speedup"][2]
    assert low <= value <= high


def test_page_is_self_contained_and_tells_the_figures(demo_folder: Path) -> None:
    html = (demo_folder / "index.html").read_text()
    figures = json.loads((demo_folder / "demo.json").read_text())
    assert f"{figures['top1']['training form']:.1%}" in html
    assert f"{figures['speedup'][0]:.2f} times the speed" in html
    fetched: list[str] = []

    class Watch(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            fetched.extend(v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith(("#", "data:")))

    Watch().feed(html)
    assert not fetched
    assert html.count("<svg") >= 5
    assert html.count("<img") == 20


@pytest.mark.slow
def test_the_demo_as_a_user_runs_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "repvgg", "demo", "--out", str(tmp_path)], check=True, capture_output=True)
    assert json.loads((tmp_path / "demo.json").read_text())["top1"]["training form"] > 0.97


def test_scans_it_leaves_can_be_predicted(demo_folder: Path) -> None:
    from repvgg.predict.labels import predict

    model = repvgg.load(demo_folder / "deploy.safetensors")
    predictions = list(predict(model, [str(demo_folder / "scans")]))
    assert len(predictions) == 20
    right = sum(p.labels[0][0] == Path(p.path).stem.partition("-")[0] for p in predictions)
    assert right >= 10  # half of them are the hardest there are


@pytest.mark.parametrize("name", ["index.html", "deploy.safetensors", "demo.json", "scans"])
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileError, match=f"holds the {name} of something else"):
        demo.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_of_another_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text('{"seed": 0}')
    with pytest.raises(FileError, match="holds the demo of seed 0, not 1: give another --out, or --seed 0"):
        demo.run(tmp_path, seed=1)
