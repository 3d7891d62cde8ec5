"""docs/scale.md: Ray Train runs our loop."""

import json
import sys
from pathlib import Path

import pytest
from ranks import run

from repvgg.models.load import load


@pytest.mark.slow
def test_ray_train_runs_our_loop(tmp_path: Path) -> None:
    """The text of docs/scale.md, with fewer images."""
    pytest.importorskip("ray")
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text()
    (text,) = (block for block in page.split("```") if "TorchTrainer(work" in block)
    text = text.replace("/shared/digits", str(tmp_path / "run")).replace(
        'open_source("digits")', 'open_source("digits").limited(128)'
    )
    start = 'import ray; ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)'
    (tmp_path / "script.py").write_text(f"{start}\n{text}")
    done = run([sys.executable, str(tmp_path / "script.py")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["processes"], summary["data"]) == (2, "digits")
    assert load(tmp_path / "run/last.safetensors") is not None
