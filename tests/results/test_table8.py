"""results/measure_table8.py: two narrow PSPNets trained alike on made-up roads, evaluated, timed, and told in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sections
from roads import make_camvid

RESULTS = Path(__file__).parent.parent.parent / "results"


@pytest.mark.slow
def test_both_are_trained_alike(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    roads, record = make_camvid(tmp_path / "camvid", size=(24, 32)), tmp_path / "table8.json"
    words = [sys.executable, str(RESULTS / "measure_table8.py"), f"camvid:{roads}", str(tmp_path / "runs"), "--epochs", "1"]
    words += ["--models", "pspnet_resnet18,pspnet_repvgg_micro_fast", "--width", "0.0625", "--record", str(record)]
    subprocess.run(words, check=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")})
    found = json.loads(record.read_text())
    first, second = found["runs"]
    assert (first["arch"], second["arch"]) == ("pspnet_resnet18", "pspnet_repvgg_micro_fast")
    assert first["recipe"] == second["recipe"]
    assert first["macs"] > 0
    assert 0 <= second["test"]["deploy form"]["mean_iou"] <= 1
    text = sections.table8(found)
    assert "1 epoch of the same photos" in text
    assert "| `pspnet_resnet18` |" in text
    assert f"the second runs {found['speed']['ratio']['value']:.2f}" in text
