"""here.py: what runs a model on this machine, and how fast it was."""

import json
from pathlib import Path

import pytest
import torch

from repvgg.cli import main
from repvgg.deploy import here
from repvgg.deploy.engines import ENGINES
from repvgg.deploy.here import engines_here

Captured = pytest.CaptureFixture[str]


def test_engines_and_their_last_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, measured = engines_here()
    assert ([engine.name for engine in found], measured) == (list(ENGINES), None)
    assert found[0].version == torch.__version__.partition("+")[0] or found[0].version == torch.__version__
    folder = tmp_path / "repvgg/engines"
    folder.mkdir(parents=True)
    (folder / "damaged.json").write_text("{")
    kept = {"engines": {"eager": {"images_per_second": 12.5}}, "options": {"input_size": [3, 8, 8], "batch_size": 4}}
    (folder / "a.json").write_text(json.dumps(kept))
    found, measured = engines_here()
    assert (found[0].images_per_second, found[1].images_per_second, measured) == (12.5, None, kept["options"])
    main(["engines"])
    assert "images/s: of the model that --engine auto measured last, 3 x 8 x 8, batches of 4" in capsys.readouterr().out
    monkeypatch.setattr(here, "find_spec", lambda name: None)
    main(["engines", "--json"])
    told = {engine["name"]: engine for engine in json.loads(capsys.readouterr().out)["engines"]}
    assert told["ncnn"]["version"] is None
    assert told["ncnn"]["remedy"] == "pip install ncnn"
    assert told["eager"]["version"]
