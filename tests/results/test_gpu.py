"""results/gpu.py: the whole of it on the CPU, within its budget, killed at any point and gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "results" / "gpu.py"
STEPS = ("speed", "training", "cifar10", "ablation", "pspnet")


def command(out: Path, minutes: float) -> list[str]:
    return [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--budget", str(minutes), "--out", str(out)]


def figures(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}  # each is whole, or this raises


@pytest.mark.slow
def test_the_whole_of_it_and_again(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("psutil")
    for _ in range(3):  # a slow machine needs more than one budget: each goes on where the last one stopped
        began = time.monotonic()
        done = subprocess.run(command(tmp_path, 3), capture_output=True, text=True)
        assert time.monotonic() - began < 3 * 60 + 30
        logs = "\n".join(path.read_text()[-1500:] for path in tmp_path.glob("*.log"))
        assert done.returncode == 0, done.stdout + logs
        found = figures(tmp_path)
        if set(found) == set(STEPS) and "no_1x1" in found["ablation"]["figures"]:
            break
    assert set(found) == set(STEPS)
    pair = found["speed"]["figures"]["repvgg_micro over resnet18, eager, fp32, batch 128, NHWC"]
    assert pair["ratio"]["value"] > 0
    assert [row["model"] for row in pair["rows"]] == ["resnet18", "repvgg_micro"]
    assert found["training"]["figures"]["repvgg_a0"]["ours, bf16, NHWC"]["images_per_second"] > 0
    folded = found["cifar10"]["figures"]["repvgg_micro"]["runs"][0]["folded"]
    assert folded["equal"] == folded["images"] == 100
    assert found["ablation"]["figures"]["plain"]["paper"] == 72.39
    assert not [f for record in found.values() for f in record["figures"].values() if "error" in f]
    before = found["speed"]["figures"]
    subprocess.run(command(tmp_path, 0.5), check=True, capture_output=True)
    assert figures(tmp_path)["speed"]["figures"] == before  # kept, not measured again


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_whole_files_and_no_process(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    process = subprocess.Popen(command(tmp_path, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "speed.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert "ratio" in next(iter(figures(tmp_path)["speed"]["figures"].values()))
    assert not _running(tmp_path)


def _running(out: Path) -> list[str]:
    import psutil

    return [p.info["name"] for p in psutil.process_iter(["cmdline", "name"]) if str(out) in " ".join(p.info["cmdline"] or [])]


def test_what_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--step", "nothing", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_images_are_shifted_and_mirrored_one_by_one() -> None:
    import torch

    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from gpu_training import augmented
    finally:
        sys.path.remove(str(SCRIPT.parent))
    images = torch.arange(1, 1 + 2 * 3 * 16 * 16, dtype=torch.float32).reshape(2, 3, 16, 16).repeat(50, 1, 1, 1)
    got = augmented(images, torch.Generator().manual_seed(0), mirror=True)
    assert got.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    crops = [[padded[i, :, r : r + 16, c : c + 16] for r in range(5) for c in range(5)] for i in range(100)]
    wanted = [any(torch.equal(got[i], crop) or torch.equal(got[i], crop.flip(2)) for crop in crops[i]) for i in range(100)]
    assert all(wanted)
    assert len({tuple(image[0, 8].tolist()) for image in got}) > 20
