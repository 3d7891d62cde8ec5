"""show_models.py: what the tables say, and that their JSON says the same."""

import json
import re
from pathlib import Path

import pytest
from conftest import randomize

from repvgg.cli import show_models as info
from repvgg.data import open_source
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.load import save
from repvgg.models.names import FAMILY
from repvgg.train.loop import new_model
from repvgg.train.recipes import RECIPES

Captured = pytest.CaptureFixture[str]


def test_the_family(capsys: Captured) -> None:
    info.show("", as_json=True)
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(FAMILY)
    assert round(rows["repvgg_a0"]["params"] / 1e6, 2) == 8.31  # Table 4: 8.30, truncated
    assert rows["repvgg_a0"]["widths"] == [48, 48, 96, 192, 1280]
    assert rows["repvgg_a0"]["depths"] == [1, 2, 4, 14, 1]
    assert round(rows["repvgg_b1g4"]["macs"] / 1e9, 1) == 7.3
    assert round(rows["repvgg_b1g4"]["winograd_muls"] / 1e9, 1) == 3.9
    assert rows["repvgg_a0"]["training_params"] > rows["repvgg_a0"]["params"]
    assert (rows["repvgg_a0"]["imagenet_top1"], rows["repvgg_a0"]["weights"]) == (72.426, True)
    assert (rows["repvgg_b1g2"]["imagenet_top1"], rows["repvgg_b1g2"]["weights"]) == (None, False)
    info.show("", as_json=False)
    table = capsys.readouterr().out
    assert re.search(r"repvgg_a0 .* 72\.43 *$", table, re.MULTILINE)
    for name, row in rows.items():
        (line,) = [line for line in table.splitlines() if re.match(rf" *{name}\s", line)]
        assert f"{row['params'] / 1e6:.2f} M" in line
        assert f"{row['macs'] / 1e9:.2f} G" in line
    assert "repvgg_d2se +SE" in table
    assert "Comparators: repvgg_b0_residual, resnet18, " in table


def test_a_member_layer_by_layer(capsys: Captured) -> None:
    info.show("RepVGG-B1g4", as_json=True)
    described = json.loads(capsys.readouterr().out)
    assert described["arch"]["name"] == "repvgg_b1g4"
    assert described["form"] == "deploy"
    assert sum(layer["params"] for layer in described["cost"]) == described["params"]
    assert sum(layer["macs"] for layer in described["cost"]) == described["macs"]
    info.show("repvgg_b1g4", as_json=False)
    table = capsys.readouterr().out
    assert "repvgg_b1g4, deploy form, input 3 x 224 x 224" in table
    lines = [line for line in table.splitlines() if re.search(r"\d+x\d+x\d+x\d+|\d+x\d+x\d+", line) and " 3x3" in line]
    assert len(lines) == 1 + 4 + 6 + 16 + 1
    assert "3x3 /2" in lines[0]
    assert "g4" in lines[2]  # the 3rd layer, counting the stem as the 1st
    assert "g4" not in lines[1]
    assert "64x112x112" in lines[0]


def test_a_comparator(capsys: Captured) -> None:
    pytest.importorskip("timm")
    info.show("resnet18", as_json=False)
    table = capsys.readouterr().out
    assert "resnet18, deploy form, input 3 x 224 x 224" in table
    assert "7x7 /2" in table


def test_a_file(tmp_path: Path, capsys: Captured) -> None:
    source = open_source("digits")
    model = randomize(new_model("repvgg_micro", source, log=str, width=0.25), (32, 1, 16, 16))
    save(model, tmp_path / "a.safetensors", training={"val_top1": 0.5, "recipe": {"epochs": 3}})
    save(reparameterize(model), tmp_path / "b.safetensors")
    info.show(str(tmp_path / "a.safetensors"), as_json=False)
    table = capsys.readouterr().out
    assert "a.safetensors, training form, input 1 x 16 x 16" in table
    assert "stem.block.conv_1x1" in table
    assert "classes           10: 0, 1, 2, 3, 4, 5, 6, 7 ..." in table
    assert "trained           val_top1 0.5" in table
    info.show(str(tmp_path / "b.safetensors"), as_json=True)
    described = json.loads(capsys.readouterr().out)
    assert described["form"] == "deploy"
    assert described["classes"] == source.classes
    assert len([layer for layer in described["layers"] if layer["op"] == "conv2d"]) == 10


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth", "repvgg_q7"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="no such file" if "." in name else "no model 'repvgg_q7'"):
        info.show(name, as_json=False)


def test_recipes(capsys: Captured) -> None:
    info.show_recipes(as_json=True)
    assert json.loads(capsys.readouterr().out)["heavy"]["epochs"] == 200
    info.show_recipes(as_json=False)
    table = capsys.readouterr().out
    assert all(name in table for name in RECIPES)
    assert re.search(r"^ *warmup-epochs +0.0 +5 +2 +1", table, re.MULTILINE)
    info.show_recipe("cifar", as_json=True)
    assert json.loads(capsys.readouterr().out)["crop"] == "shift"
    info.show_recipe("cifar", as_json=False)
    assert re.search(r"^ *--batch-size +256", capsys.readouterr().out, re.MULTILINE)
