"""results/measure_pruning.py: plain and residual networks are cut to the same number of multiply-adds."""

from typing import Any

import measure_pruning
import torch
from conftest import randomize

import repvgg
from repvgg.deploy.prune import pruned


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
