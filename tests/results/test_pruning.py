"""results/measure_pruning.py: plain and residual networks are cut to the same number of multiply-adds, and told of together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure_pruning
import pytest
import sections
import torch
from conftest import randomize
from plain_recipe import PLAIN

import repvgg
from repvgg.data import Decoded, Source
from repvgg.deploy.prune import pruned
from repvgg.models.manifest import Preprocessing


def test_the_residual_network_keeps_as_many_macs_as_the_plain_one() -> None:
    images = torch.randn(2, 3, 32, 32)

    def left(model: Any, keep: float) -> int:
        """Return the MACs of the deploy form."""
        return repvgg.cost(repvgg.reparameterize(pruned(model, images, keep)), (3, 32, 32)).macs

    how: dict[str, Any] = {"num_classes": 3, "width": 0.125, "small_input": True}
    plain, residual = (
        randomize(repvgg.create_model(network["arch"], block="plain", **how), (2, 3, 32, 32))
        for network in measure_pruning.STRUCTURES.values()
    )
    macs = left(plain, measure_pruning.KEEP)
    keep = measure_pruning.share_left(residual, macs)
    assert 0.9 * macs < left(residual, keep) <= macs < left(residual, keep + 0.02)


def test_both_structures_are_trained_cut_and_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels = [i % 2 for i in range(64)]
    pixels = torch.randint(0, 128, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = Decoded((pixels + 100 * torch.tensor(labels)[:, None, None, None]).to(torch.uint8), labels)
    source = Source("bright and dark", images, images, ["dark", "bright"], Preprocessing((3, 32, 32), 32))
    monkeypatch.setattr(measure_pruning, "open_source", lambda data: source)
    few = {"WIDTH": 0.125, "FIRST_EPOCHS": 1, "AFTER_EPOCHS": 1, "SEEDS": 2, "HALVINGS": 5, "OUT": tmp_path / "pruning.json"}
    for name, value in few.items():
        monkeypatch.setattr(measure_pruning, name, value)
    for name, value in (("ROUNDS", 2), ("BATCHES", 1), ("WARMUP", 0)):
        monkeypatch.setattr(f"repvgg.deploy.speedup.{name}", value)
    monkeypatch.setattr(measure_pruning, "PLAIN", replace(PLAIN, lr=0.001, batch_size=32))
    measure_pruning.structures(tmp_path / "runs", "")
    record = json.loads((tmp_path / "pruning.json").read_text())["structures"]
    assert {name: len(record[name]) for name in ("plain", "residual")} == {"plain": 2, "residual": 2}
    assert record["residual"][0]["macs"][1] <= record["plain"][0]["macs"][1] < record["plain"][0]["macs"][0]
    lost = [100 * (run["accuracy"]["before"]["top1"] - run["accuracy"]["after"]["top1"]) for run in record["plain"]]
    assert f"pruning took {sum(lost) / 2:.2f} ± " in sections._structures(record)
