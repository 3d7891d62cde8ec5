"""entry.py: one line for everything that cannot work, and how a command ends."""

import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TRAIN, Captured, refused, repvgg

from repvgg import cli
from repvgg.cli import entry
from repvgg.models.load import save
from repvgg.models.zoo import create_model
from repvgg.version import __version__

# ------------------------------------------------------------------------------------------------- what cannot work: one line


def test_a_backbone_has_no_labels(scans: Path, tmp_path: Path, capsys: Captured) -> None:
    save(create_model("repvgg_micro", num_classes=0, in_chans=1, width=0.0625), tmp_path / "b.safetensors")
    for words in (["predict", tmp_path / "b.safetensors", scans], ["eval", tmp_path / "b.safetensors", "--data", "digits"]):
        assert "b.safetensors: a backbone, which gives no labels: train a head on it first" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory: take a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), "out of memory: take"),
        (RuntimeError("shapes\n\x1b[2J differ"), r"RuntimeError: shapes \x1b[2J differ (REPVGG_DEBUG=1 shows where)"),
        (TypeError("no len()"), "TypeError: no len() (REPVGG_DEBUG=1 shows where)"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_no_error_is_a_traceback(error: Exception, line: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(entry, "_run", fail)
    assert refused(capsys, "info").startswith(line)


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
            "no data 'nowhere': digits, a folder of class folders, a table (.csv), cifar10[:ROOT], hf:NAME, hf-stream:NAME, wds:",
        ),
        ("--data hf:./nowhere", "no such folder"),
        ("--device tpu", "no device 'tpu' here: "),
        ("--device cuda:99", "no device 'cuda:99' here: "),
        ("--workers -1", "--workers -1: at least 0"),
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
        (
            ["convert", tmp_path / "a.onnx", tmp_path / "b.onnx", "--to-keys", "timm"],
            "--to-keys is for model files",
        ),
        (["convert", file, tmp_path / "b.safetensors", "--checkpoint", file], "--checkpoint is for timm:NAME"),
        (["info", "repvgg_a0", "--graph", tmp_path / "a.onnx"], "lists that file alone: leave out repvgg_a0"),
        (["convert", run / "run/best.safetensors", tmp_path / "no/where/x.safetensors"], "there is no folder"),
        (["predict", file, tmp_path / "no.png"], "no such file, and no file fits it"),
        (["convert", run / "run/best.safetensors", tmp_path / "x.onnx"], "other runtimes' files are written by repvgg export"),
        (["predict", file, tmp_path / "empty"], "a folder without images"),
        (["predict", file, "https://a.example/b.jpg"], "an address: save the image as a file first"),
        (["predict", file, scans, "--batch-size", 0], "--batch-size and --top are at least 1"),
        (["predict", file, scans, "--top", 0], "--batch-size and --top are at least 1"),
        (["predict", tmp_path, scans], "is a folder without a best.safetensors: name a run folder or a model file"),
        (["trian", "--data", "digits"], "no command 'trian': did you mean train?"),
        (["train", "--data", "digits", "--epoch", 3], "train --epoch: did you mean --epochs?"),
        (["info", "repvgg_nano"], "no model 'repvgg_nano': did you mean repvgg_a"),
        (["info", tmp_path / "zero.safetensors"], "is empty"),
        (["info", "vgg61"], "no model 'vgg61'"),
        (["recipe", "auto"], "the recipe auto is chosen when it has seen the images"),
        (["recipe", "nope"], "no recipe 'nope': auto, light, heavy, cifar, finetune, pspnet, camvid, demo"),
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
    assert refused(capsys, "predict", run / "run/best.safetensors", scans) == "this needs torchvision: pip install torchvision"


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
    code = "import sys\nfrom repvgg.cli import main\nmain(['--help'])\n"
    shown = in_a_process(code + "print('HEAVY', *{'torch', 'torchvision', 'numpy', 'datasets'} & set(sys.modules))")
    *page, heavy = shown.splitlines()
    assert heavy == "HEAVY"
    for command in ("demo", "info", "recipe", "train", "eval", "convert", "predict"):
        assert re.search(rf"\b{command}\b", "\n".join(page))


def test_the_library_imports_no_torchvision_timm_or_datasets() -> None:
    code = "import sys, repvgg; m = repvgg.create_model('repvgg_micro', num_classes=2).eval(); repvgg.reparameterize(m); "
    assert in_a_process(code + "print(*{'torchvision', 'timm', 'datasets', 'matplotlib'} & set(sys.modules))") == "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_terminal_that_closes_ends_it_but_not_under_nohup() -> None:
    code = (
        "import sys, time; from repvgg.cli import entry\n"
        "entry._run = lambda words: (print('on', flush=True), time.sleep(100))\nentry.main([])"
    )
    for ignored, code_of_hangup in ((False, 129), (True, 143)):
        before = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # these tests may be under it
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, preexec_fn=before) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "on\n"
            process.send_signal(signal.SIGHUP)
            if ignored:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == code_of_hangup


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_any_limit_of_memory_ends_in_a_line_or_in_success(run: Path, scans: Path) -> None:
    """With 400 and 500 MiB PyTorch cannot be imported; with some more, its libraries may crash while they are being loaded."""
    commands = [["info", str(run / "deploy.safetensors")], ["predict", str(run / "run/best.safetensors"), str(scans)]]
    ends = set()
    for command in commands:
        for limit in (400, 500, 1000, 1200):

            def limited(limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))

            words = [sys.executable, "-m", "repvgg", *command]
            done = subprocess.run(words, preexec_fn=limited, capture_output=True, text=True, timeout=300)
            ends.add(done.returncode)
            assert done.returncode in (0, 2), (limit, done.stderr)
            if done.returncode:
                assert "damaged" not in done.stderr
                assert "Traceback" not in done.stderr
    assert ends == {0, 2}


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
