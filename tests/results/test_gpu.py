"""results/gpu.py: the whole of it on the CPU, within its budget, killed at any point and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "results" / "gpu.py"
STEPS = ("speed", "training", "cifar10", "ablation", "pspnet")
VARIANTS = {"plain", "no_1x1", "no_identity", "repvgg", "identity_no_bn", "post_bn", "relu_in_branch", "dirac", "trivial", "acb"}
MARK = "REPVGG_TEST_OF"  # in the environment of all that a test starts


def command(out: Path, minutes: float, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--budget", str(minutes), "--out", str(out), *more]


def alone(mark: Path) -> dict[str, str]:
    """An environment in which nothing finds our package but by the script's own doing."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, MARK: str(mark)}


def figures(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}  # each is whole, or this raises


def logs(out: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in out.with_name(f"{out.name}-work").glob("*.log"))


def running(mark: Path) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_the_whole_of_it_and_again(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("psutil")
    out = tmp_path / "out"
    for _ in range(3):  # a slow machine needs more than one budget: each goes on where the last one stopped
        began = time.monotonic()
        done = subprocess.run(command(out, 3), capture_output=True, text=True, env=alone(tmp_path))
        assert time.monotonic() - began < 3 * 60 + 30
        assert done.returncode == 0, done.stdout + logs(out)
        found = figures(out)
        if set(found) == set(STEPS) and sum(f["finished"] for f in found["ablation"]["figures"].values()) > len(VARIANTS):
            break
    assert set(found) == set(STEPS)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{step}.json" for step in STEPS
    )  # all that has to be carried back
    first, pair = next(iter(found["speed"]["figures"].items()))
    assert first == "repvgg_micro over resnet18, eager, fp32, batch 128, NCHW"
    assert pair["ratio"]["value"] > 0
    assert [row["model"] for row in pair["rows"]] == ["resnet18", "repvgg_micro"]
    assert found["training"]["figures"]["repvgg_a0, bf16, NHWC"]["images_per_second"]["ours"] > 0
    folded = found["cifar10"]["figures"]["repvgg_micro"]["runs"][0]["folded"]
    assert folded["equal"] == folded["images"] == 100
    ablation = found["ablation"]["figures"]
    assert set(ablation) == {*VARIANTS, "residual"}
    assert all(f["finished"] for f in ablation.values())
    assert ablation["plain"]["paper"] == 72.39
    assert {name for name, f in ablation.items() if f["runs"][0]["folded"] is None} == {"relu_in_branch"}
    assert not [f for record in found.values() for f in record["figures"].values() if "error" in f]
    for step in STEPS:
        assert "|" in words(step, found[step])
    before = found["speed"]["figures"]
    subprocess.run(command(out, 0.5), check=True, capture_output=True, env=alone(tmp_path))
    assert figures(out)["speed"]["figures"] == before  # kept, not measured again


def words(step: str, record: dict[str, Any]) -> str:
    """What docs/results.md says of a step."""
    import gpu_words

    return str(getattr(gpu_words, step)(record))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "file", "seconds"),
    [
        (signal.SIGTERM, "out-work", 1.0),  # before the first step
        (signal.SIGKILL, "out-work/speed.log", 4.0),  # in its first figure
        (signal.SIGINT, "out/speed.json", 0.0),
        (signal.SIGKILL, "out/speed.json", 1.0),
        (signal.SIGTERM, "out-work/cifar10.log", 5.0),  # while processes of processes train
        (signal.SIGKILL, "out-work/cifar10.log", 5.0),
    ],
)
def test_killed_at_any_point_it_leaves_whole_files_and_no_process(
    how: signal.Signals, file: str, seconds: float, tmp_path: Path
) -> None:
    pytest.importorskip("psutil")
    out = tmp_path / "out"
    process = subprocess.Popen(command(out, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone(tmp_path))
    while not (tmp_path / file).exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(how)
    process.wait(30)
    deadline = time.monotonic() + 10
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(tmp_path)
    for record in figures(out).values():
        assert record["figures"]
    again = subprocess.run(command(out, 0.02), capture_output=True, text=True, env=alone(tmp_path))
    assert again.returncode == 0, again.stderr + logs(out)


@pytest.mark.slow
def test_two_at_once_are_one_too_many(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(out, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone(tmp_path))
    try:
        while not (out / ".lock").exists():
            time.sleep(0.05)
        done = subprocess.run(command(out, 1), capture_output=True, text=True, env=alone(tmp_path))
        assert done.returncode == 2
        assert f"process {process.pid}" in done.stderr
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 128 + signal.SIGTERM


# ------------------------------------------------------------------------------------------- what ends before it has begun


def test_what_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    for more, why in ((("--step", "nothing"), "invalid choice"), (("--data", "none-*.npz"), "none-*.npz: there is no such file")):
        done = subprocess.run(command(tmp_path, 1, *more), capture_output=True, text=True)
        assert done.returncode == 2
        assert why in done.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    done = subprocess.run(command(tmp_path / "out", 1, "--device", "cuda:77"), capture_output=True, text=True, env=alone(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("--device cuda:77: ")
    assert done.stderr.count("\n") == 1
    assert not figures(tmp_path / "out")


@pytest.mark.slow
def test_wheels_that_lie_there_are_taken(tmp_path: Path) -> None:
    """A wheel of this name comes before the timm that is installed, and none of its needs is asked for."""
    wheels, meta = tmp_path / "wheels", "timm-99.dist-info"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "timm-99-py3-none-any.whl", "w") as wheel:
        wheel.writestr("timm.py", "raise ImportError('this is the one that was brought')")
        wheel.writestr(
            f"{meta}/METADATA", "Metadata-Version: 2.1\nName: timm\nVersion: 99\nRequires-Dist: there-is-no-such-thing\n"
        )
        wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{meta}/RECORD", "")
    more = ("--wheels", str(wheels))
    done = subprocess.run(command(tmp_path / "out", 1, *more), capture_output=True, text=True, env=alone(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stderr == "--device cpu: ImportError: this is the one that was brought\n"
