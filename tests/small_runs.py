"""Training runs of a second: a narrow net on a few scans."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg.data import open_source
from repvgg.train.loop import Run, train
from repvgg.train.recipes import Recipe, get_recipe

DEMO = get_recipe("demo")
QUICK = replace(DEMO, epochs=2, batch_size=32, warmup_epochs=0)


def quick(out: Path, recipe: Recipe = QUICK, limit: int = 96, **options: Any) -> Run:
    """A run of a second: a narrow net on a few scans."""
    source = open_source("digits").limited(limit)
    return train("repvgg_micro", source, recipe, out, log=lambda line: None, **{"width": 0.25, **options})


def state(run: Run) -> dict[str, Tensor]:
    return run.model.state_dict()


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a).values(), state(b).values(), strict=True))
