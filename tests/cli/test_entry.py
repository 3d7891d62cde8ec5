"""The commands as a user meets it: the whole road on digits, and one line for everything that cannot work."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from repvgg import cli
from repvgg.data import open_source
from repvgg.models import zoo
from repvgg.models.load import load
from repvgg.version import __version__

Captured = pytest.CaptureFixture[str]
TRAIN = "train --arch repvgg_micro --width 0.25 --data digits --limit 320 --device cpu"


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def repvgg(*words: Any) -> int:
    """The exit code of the command, run in this process."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def refused(capsys: Captured, *words: Any) -> str:
    """The one line that a command which cannot work leaves on stderr, after its remarks; nothing on stdout."""
    capsys.readouterr()
    assert repvgg(*words) == 2
    shown = capsys.readouterr()
    *_, line = shown.err.splitlines()
    assert line.startswith("repvgg: ")
    assert shown.err.count("repvgg: ") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    return line.removeprefix("repvgg: ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run folder, and its deploy form beside it."""
    out = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", io.StringIO())
        patch.setattr("sys.stdout", io.StringIO())
        assert repvgg(*TRAIN.split(), "--epochs", 3, "--batch-size", 32, "--out", out / "run") == 0
        assert repvgg("convert", out / "run/best.safetensors", out / "deploy.safetensors") == 0
    return out


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scans as files, each named by its number and label."""
    folder = tmp_path_factory.mktemp("scans")
    source = open_source("digits")
    for i in range(6):
        image, label = source.val[i]
        Image.fromarray(image[0].numpy()).save(folder / f"{i}-{label}.png")
    return folder


# --------------------------------------------------------------------------------------------------------------- the whole road


def test_train_leaves_a_run_folder(run: Path) -> None:
    files = {"best.safetensors", "last.safetensors", "recipe.json", "metrics.jsonl", "summary.json", "curve.png", "state"}
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt2", "best.pt2.json"]
    pytest.importorskip("ncnn")
    line = refused(capsys, *words[:2], "--to", "ncnn", "--out", tmp_path / "new", "--batch-size", 2)
    assert line == "ncnn runs one image at a time: leave out --batch-size"
    assert not (tmp_path / "new").exists()


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
    assert all(0 <= r["rows"][0]["max_rel_err"] < 1e-5 < r["rows"][0]["load_seconds"] for r in reports)
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


# ------------------------------------------------------------------------------------------------- what cannot work: one line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--limit 0", "--limit 0: at least one image is needed"),
        ("--epochs 0", "epochs is 0: at least 1"),
        ("--batch-size 0", "batch_size is 0: at least 1"),
        ("--lr 0", "lr is 0"),
        ("--momentum 1.5", "momentum is 1.5: from 0 to below 1"),
        ("--block nope", "no block 'nope': there are repvgg, "),
        ("--width 0", "width"),
        ("--arch repvgg_z9", "no model 'repvgg_z9': did you mean"),
        ("--arch nonsense", "no model 'nonsense': see repvgg info"),
        ("--recipe lihgt", "no recipe 'lihgt': "),
        (
            "--data nowhere",
            "no data 'nowhere': digits, a folder with train/ and val/, cifar10[:ROOT], hf:NAME, hf-stream:NAME, wds:SHARDS, ",
        ),
        ("--data hf:./nowhere", "no such folder"),
        ("--device tpu", "no device 'tpu' here: "),
        ("--device cuda:99", "no device 'cuda:99' here: "),
        ("--workers -1", "num_workers"),
    ],
)
def test_train_refuses(flags: str, complaint: str, tmp_path: Path, capsys: Captured) -> None:
    line = refused(capsys, *TRAIN.split(), "--out", tmp_path / "run", *flags.split())
    assert complaint in line
    assert not list(tmp_path.glob("run/*.safetensors"))
    if "workers" not in flags:
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    file = run / "deploy.safetensors"
    for words in ([*TRAIN.split(), "--out", tmp_path / "run"], ["eval", file, "--data", "digits"], ["predict", file, scans]):
        assert refused(capsys, *words, "--device", "cuda").startswith("no device 'cuda' here: cpu")
    assert not (tmp_path / "run").exists()


def test_out_that_is_a_file_or_read_only(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file/below", "/proc/run"):
        assert refused(capsys, *TRAIN.split(), "--out", out).startswith(f"{out}: cannot be a run folder (")
    assert (tmp_path / "file").read_text() == "precious"


def test_eval_convert_predict_and_info_refuse(run: Path, scans: Path, tmp_path: Path, capsys: Captured) -> None:
    file = run / "deploy.safetensors"
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.safetensors").touch()
    cases: list[tuple[list[Any], str]] = [
        (["eval", tmp_path / "no.safetensors", "--data", "digits"], "no such file"),
        (["eval", tmp_path / "zero.safetensors", "--data", "digits"], "is empty (zero bytes)"),
        (["eval", file, "--data", "nowhere"], "no data 'nowhere'"),
        (["eval", file, "--data", "digits", "--limit", 0], "--limit 0"),
        (["eval", file, "--data", "digits", "--batch-size", 0], "--batch-size 0: at least 1"),
        (["eval", "repvgg_z9", "--data", "digits"], "no model 'repvgg_z9'"),
        (["convert", tmp_path / "no.pth", tmp_path / "x.safetensors"], "no such file"),
        (["convert", run / "run/best.safetensors", tmp_path / "no/where/x.safetensors"], "there is no folder"),
        (["predict", file, tmp_path / "no.png"], "no such file, and no file fits it"),
        (["predict", file, tmp_path / "empty"], "a folder without images"),
        (["predict", file, scans, "--batch-size", 0], "--batch-size and --top are at least 1"),
        (["predict", file, scans, "--top", 0], "--batch-size and --top are at least 1"),
        (["predict", tmp_path, scans], "is a folder, not a model file"),
        (["info", tmp_path / "zero.safetensors"], "is empty"),
        (["info", "vgg61"], "no model 'vgg61'"),
        (["recipe", "nope"], "no recipe 'nope': light, heavy, cifar, finetune, pspnet, camvid, demo"),
    ]
    for words, complaint in cases:
        assert complaint in refused(capsys, *words), words
    assert not (tmp_path / "x.safetensors").exists()


def test_a_mistyped_flag_is_a_usage_error(capsys: Captured) -> None:
    for words in ("train --data", "train --recipe", "train --data digits", "nonsense", "eval", "recipe light --jsn", "predict"):
        assert repvgg(*words.split()) == 2, words
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        assert shown.err


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Captured, run: Path, scans: Path) -> None:
    def without(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr("repvgg.predict.labels.expand", without)
    assert refused(capsys, "predict", run / "deploy.safetensors", scans) == "this needs torchvision: pip install 'repvgg[all]'"


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe"):
        cli.main(["recipe", "nope"])


# ------------------------------------------------------------------------------------------------------ processes of their own


def test_version(capsys: Captured) -> None:
    assert repvgg("--version") == repvgg("-V") == 0
    assert capsys.readouterr().out == f"repvgg {__version__}\n" * 2


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom repvgg.cli import main\ntry: main(['--help'])\nexcept SystemExit as stop: code = stop.code\n"
    shown = in_a_process(code + "print('HEAVY', code, *{'torch', 'torchvision', 'numpy', 'datasets'} & set(sys.modules))")
    *page, heavy = shown.splitlines()
    assert heavy == "HEAVY 0"
    for command in ("demo", "info", "recipe", "train", "eval", "convert", "predict"):
        assert re.search(rf"\b{command}\b", "\n".join(page))


def test_the_library_imports_no_torchvision_timm_or_datasets() -> None:
    code = "import sys, repvgg; m = repvgg.create_model('repvgg_micro', num_classes=2).eval(); repvgg.reparameterize(m); "
    assert in_a_process(code + "print(*{'torchvision', 'timm', 'datasets', 'matplotlib'} & set(sys.modules))") == "\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    """`repvgg recipe | head -0`: the pipe is closed before anything is written."""
    for words in (["recipe"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "repvgg", *words], stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
        )
        os.close(write)
        assert done.stderr == b""
        assert done.returncode == 1
