"""show_results.py: what the tables say, and that their JSON says the same."""

import json
import re
from collections.abc import Iterator

import pytest
import torch

from repvgg.cli import show_results as info
from repvgg.predict.prediction import Prediction
from repvgg.train.evaluate import Accuracy

Captured = pytest.CaptureFixture[str]


def test_accuracy(capsys: Captured) -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 4]])
    accuracy = Accuracy(10, 0.5, 0.7, 1.0, confusion)
    info.show_accuracy(accuracy, ["cat", "dog", "owl"], as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["per_class"] == {"cat": 0.75, "dog": None, "owl": pytest.approx(2 / 3)}
    assert shown["precision"] == {"cat": pytest.approx(0.6), "dog": 0.0, "owl": 1.0}
    assert shown["f1"] == {"cat": pytest.approx(2 * 0.6 * 0.75 / 1.35), "dog": 0.0, "owl": 0.8}
    assert shown["confusion"] == confusion.tolist()
    assert (shown["images"], shown["top1"], shown["top5"], shown["loss"]) == (10, 0.7, 1, 0.5)
    info.show_accuracy(accuracy, ["cat", "dog", "owl"], as_json=False)
    table = capsys.readouterr().out
    assert re.search(r"^ *true \\ predicted +cat +dog +owl *$", table, re.MULTILINE)
    assert re.search(r"^ *cat +3 +1 +\. *$", table, re.MULTILINE)
    assert re.search(r"^ *dog +\. +\. +\. *$", table, re.MULTILINE)
    assert re.search(r"^ *cat +4 +60.0% +75.0% +66.7% *$", table, re.MULTILINE)
    assert re.search(r"^ *dog +0 +0.0% +0.0% *$", table, re.MULTILINE)  # no images, so no recall
    assert "nan" not in table
    assert "top-1 70.00%   top-5 100.00%   loss 0.5000   10 images" in table


def test_names_of_classes_are_never_cut(capsys: Captured) -> None:
    classes = [f"a class with a long name, number {i}" for i in "abc"]
    info.show_accuracy(Accuracy(6, 0.5, 1.0, 1.0, torch.diag(torch.tensor([1, 2, 3]))), classes, as_json=False)
    table = capsys.readouterr().out
    for number, name in enumerate(classes, 1):
        assert re.search(rf"^ *{number} {name} ", table, re.MULTILINE)
    assert re.search(r"^ *true \\ predicted +1 +2 +3 *$", table, re.MULTILINE)


def test_accuracy_of_many_classes_lists_the_hardest(capsys: Captured) -> None:
    right = torch.arange(30)
    confusion = torch.diag(right)
    confusion[:, 0] += 29 - right
    confusion[7] = 0  # absent
    info.show_accuracy(Accuracy(870, 1, 0.5, 0.9, confusion), [f"class{i}" for i in range(30)], as_json=False)
    table = capsys.readouterr().out
    assert "The 20 hardest classes" in table
    listed = re.findall(r"^ *class(\d+) ", table, re.MULTILINE)
    assert listed == [str(i) for i in range(1, 22) if i != 7]


def test_predictions(capsys: Captured) -> None:
    answers = [Prediction("a.png", [("cat", 0.75), ("dog", 0.25)]), Prediction("b [x].png", [("dog", 0.6), ("cat", 0.4)])]
    info.show_answers(answers, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = [{"label": "cat", "probability": 0.75}, {"label": "dog", "probability": 0.25}]
    assert lines[0] == {"path": "a.png", "labels": labels, "engine": "pytorch"}
    assert len(lines) == 2
    info.show_answers(answers, as_json=False)
    assert re.search(r"^ *b \[x\]\.png +dog 60.0% +cat 40.0%", capsys.readouterr().out, re.MULTILINE)


def test_what_was_found_before_something_fails_is_shown(capsys: Captured) -> None:
    def answers() -> Iterator[Prediction]:
        yield Prediction("a.png", [("cat", 1.0)])
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        info.show_answers(answers(), as_json=False)
    assert "a.png" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_predictions_with_unreadable_images(as_json: bool, quiet: bool, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repvgg.terminal.quiet", quiet)  # -q hides progress, never what failed
    answers = [Prediction("bad.png", [], "bad.png: no image"), Prediction("a.png", [("cat", 1.0)])]
    with pytest.raises(ValueError, match="1 of 2 images could not be read"):
        info.show_answers(iter(answers), as_json)
    shown = capsys.readouterr()
    assert "a.png" in shown.out
    assert "bad" not in shown.out
    assert shown.err == "repvgg: bad.png: no image\n"
