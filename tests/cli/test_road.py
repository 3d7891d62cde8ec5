"""The commands as a user meets them: the whole road on digits."""

import json
import re
from pathlib import Path

import pytest
from commands import TRAIN, Captured, refused, repvgg
from forks import Forks
from rounding import REPORTED

from repvgg.models import zoo
from repvgg.models.load import load, save

# --------------------------------------------------------------------------------------------------------------- the whole road


def test_train_leaves_a_run_folder(run: Path) -> None:
    files = {"best.safetensors", "last.safetensors", "recipe.json", "settings.json", "metrics.jsonl"}
    files |= {"summary.json", "curve.png", "state"}
    assert {p.name for p in (run / "run").iterdir() if not p.name.startswith("events.")} == files
    recipe = json.loads((run / "run/recipe.json").read_text())
    assert (recipe["epochs"], recipe["batch_size"], recipe["crop"]) == (3, 32, "shift")  # two flags, and the recipe of digits


def test_eval_of_both_forms(run: Path, capsys: Captured) -> None:
    shown = []
    for file in ("run/best.safetensors", "deploy.safetensors"):
        assert repvgg("eval", run / file, "--data", "digits", "--json") == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0]["confusion"] == shown[1]["confusion"]
    assert shown[0]["images"] == 360
    assert sum(map(sum, shown[0]["confusion"])) == 360
    assert shown[0]["top5"] >= shown[0]["top1"] > 0.2
    assert repvgg("eval", run / "deploy.safetensors", "--data", "digits", "--limit", 50, "--batch-size", 7) == 0
    table = capsys.readouterr().out
    assert "Confusion matrix" in table
    assert "50 images" in table


def test_convert_says_what_it_folded_and_refuses_to_fold_twice(run: Path, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "x.safetensors"
    assert repvgg("convert", run / "run/last.safetensors", target) == 0
    assert "deploy form" in capsys.readouterr().err
    assert zoo.manifest_of(load(target)).form == "deploy"
    line = refused(capsys, "convert", target, tmp_path / "y.safetensors")
    assert line == f"{target}: is in deploy form already, there is nothing to fold (--to-keys re-spells its keys)"
    assert repvgg("convert", target, tmp_path / "timm.pth", "--to-keys", "timm") == 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["timm.pth", "x.safetensors"]


def test_export(run: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ("export", run / "run/best.safetensors", "--to", "pt2", "--out", tmp_path)
    assert repvgg(*words, "--data", "digits", "--images", 50) == 0
    assert "50 of 50 predictions the same" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt2", "best.pt2.json", "best.pt2.py"]
    pytest.importorskip("ncnn")
    line = refused(capsys, *words[:2], "--to", "ncnn", "--out", tmp_path / "new", "--batch-size", 2)
    assert line == "ncnn runs one image at a time: leave out --batch-size"
    assert not (tmp_path / "new").exists()


def test_several_files_at_once(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    assert repvgg("export", run / "run", "--to", "pt2", "ncnn", "--out", tmp_path) == 0
    names = {"run.pt2", "run.ncnn.param"}
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}{end}" for n in names for end in ("", ".json", ".py")} | {"run.ncnn.bin"}


def test_eval_and_predict_by_an_engine(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("ncnn")
    model = run / "run/best.safetensors"
    assert repvgg("export", model, "--to", "ncnn", "--out", tmp_path) == 0
    shown = []
    for words in ((model,), (model, "--engine", "ncnn"), (tmp_path,)):
        capsys.readouterr()
        assert repvgg("eval", *words, "--data", "digits", "--limit", 60, "--json") == 0
        shown.append(json.loads(capsys.readouterr().out)["confusion"])
    assert shown[0] == shown[1] == shown[2]
    shown = []
    for words in ((model,), (model, "--engine", "ncnn"), (tmp_path / "best.ncnn.param",)):
        assert repvgg("predict", words[0], scans, *words[1:], "--json", "--top", 1) == 0
        shown.append([json.loads(line)["labels"][0]["label"] for line in capsys.readouterr().out.splitlines()])
    assert shown[0] == shown[1] == shown[2]
    assert "no engine 'tpu'" in refused(capsys, "predict", model, scans, "--engine", "tpu")


def test_bench_of_several_batch_sizes(capsys: Captured) -> None:
    words = ("bench", "repvgg_micro", "--input-size", 32, "--rounds", 1, "--batches", 1, "--warmup", 0, "--batch-size")
    assert repvgg(*words, "1,2", "--json") == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert [r["rows"][0]["batch_size"] for r in reports] == [1, 2]
    assert all(0 <= r["rows"][0]["max_rel_err"] < REPORTED and r["rows"][0]["load_seconds"] > 0 for r in reports)
    assert refused(capsys, *words, "1;2") == "'1;2': numbers with commas between them are needed, such as 1,32"


def test_predict(run: Path, scans: Path, capsys: Captured) -> None:
    assert repvgg("predict", run / "deploy.safetensors", scans, "--json", "--top", 2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).name for line in lines] == sorted(p.name for p in scans.iterdir())
    assert all(len(line["labels"]) == 2 and line["labels"][0]["label"] in "0123456789" for line in lines)
    assert repvgg("predict", run / "run/best.safetensors", *sorted(scans.iterdir()), "--batch-size", 4) == 0
    table = capsys.readouterr().out
    for line in lines:
        best = line["labels"][0]
        assert re.search(rf"^ *{re.escape(line['path'])} +{best['label']} {best['probability']:.1%}", table, re.MULTILINE)


def test_predict_goes_on_after_a_bad_image(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bad.png").write_text("not an image")
    good = sorted(scans.iterdir())[0]
    assert repvgg("predict", run / "deploy.safetensors", tmp_path / "bad.png", good, "--json") == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["path"] == str(good)
    first, last = shown.err.splitlines()
    assert first.startswith(f"repvgg: {tmp_path}/bad.png: not an image")
    assert last == "repvgg: 1 of 2 images could not be read"


def test_info_and_recipe(run: Path, capsys: Captured) -> None:
    assert repvgg("info", run / "deploy.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["form"] == "deploy"
    assert repvgg("recipe") == 0
    assert "light" in capsys.readouterr().out
    assert repvgg("recipe", "heavy", "--json") == 0
    assert json.loads(capsys.readouterr().out)["mixup"] == 0.2


def test_the_recipe_named_gives_the_defaults_and_flags_change_them(tmp_path: Path, capsys: Captured) -> None:
    words = [
        *TRAIN.split(),
        "--limit",
        "40",
        "--recipe",
        "heavy",
        "--epochs",
        "1",
        "--no-flip",
        "--lr=0.01",
        "--out",
        str(tmp_path),
    ]
    assert repvgg(*words) == 0
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["mixup"], recipe["auto_augment"], recipe["epochs"], recipe["flip"], recipe["lr"]) == (0.2, True, 1, False, 0.01)
    assert "best val top-1" in capsys.readouterr().out


def test_a_run_folder_stands_for_its_best_model(run: Path, scans: Path, capsys: Captured) -> None:
    shown = []
    for model in (run / "run", run / "run" / "best.safetensors"):
        capsys.readouterr()
        assert repvgg("predict", model, scans, "--json") == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_names_of_strangers_cannot_steer_the_terminal(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    model = load(run / "deploy.safetensors")
    save(model, tmp_path / "m.safetensors", classes=[f"{i}\n\x1b[2Jfine" for i in range(10)])
    scan = tmp_path / "a\n\x1b]0;b.png"
    scan.write_bytes(sorted(scans.iterdir())[0].read_bytes())
    (tmp_path / "bad\x1b[2J.png").write_text("no image")
    assert repvgg("predict", tmp_path / "m.safetensors", scan, tmp_path / "bad\x1b[2J.png") == 2
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "]0;b.png" in shown.out
    assert r"\n\x1b[2Jfine" in shown.out
    assert "[2J.png" in shown.err
    assert repvgg("info", tmp_path / "m.safetensors") == 0
    assert repvgg("eval", tmp_path / "m.safetensors", "--data", "digits", "--limit", 20) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_convert_writes_the_same_bytes_each_time(run: Path, tmp_path: Path, forks: Forks) -> None:
    """Here, and in a process of its own, with other hashes of strings."""
    source = str(run / "run/best.safetensors")
    for suffix in (".safetensors", ".pth"):
        assert forks(["convert", source, str(tmp_path / f"there{suffix}")], tmp_path).code == 0
        assert repvgg("convert", source, tmp_path / f"here{suffix}") == 0
        assert (tmp_path / f"here{suffix}").read_bytes() == (tmp_path / f"there{suffix}").read_bytes()
