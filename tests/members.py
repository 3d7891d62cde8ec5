"""Narrow members on random statistics, and what it means that one came back whole."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from torch import Tensor, nn

import repvgg
from repvgg.disk import FileError
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.names import FAMILY

# One of each sort stands for its like, which are slow: no groups, groups, squeeze-excite, and the smallest.
SORTS = ("repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvgg_micro")
EVERY_MEMBER = [pytest.param(name, marks=[] if name in SORTS else pytest.mark.slow) for name in FAMILY]
# The same without the deepest, which takes as long as the others together.
SHALLOWER = [pytest.param(name, marks=[] if name in SORTS and name != "repvgg_d2se" else pytest.mark.slow) for name in FAMILY]
Tensors = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))  # those of `logits`
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def narrow(name: str = "repvgg_micro", form: str = "training", **options: Any) -> nn.Module:
    """A narrow member on random statistics, in eval mode."""
    model = zoo.create_model(name, **{"num_classes": 7, "width": 1 / 8, **options})
    randomize(model, (4, options.get("in_chans", 3), 64, 64))
    return reparameterize(model) if form == "deploy" else model


@cache
def member(name: str, form: str) -> nn.Module:
    """As `narrow`. Shared between tests: not to be changed."""
    return reparameterize(member(name, "training")) if form == "deploy" else narrow(name)


def logits(model: nn.Module, side: int = 64) -> Tensor:
    """Of the same two random images for every model; float64."""
    like = next(model.parameters())
    x = torch.randn(2, zoo.manifest_of(model).preprocessing.input_size[0], side, side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x.to(like)).double()  # type: ignore[no-any-return]


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    for name in x:
        assert x[name].dtype == y[name].dtype
        assert torch.equal(x[name], y[name]), name


def assert_round_trip(model: nn.Module, path: Path, side: int = 64) -> nn.Module:
    repvgg.save(model, path)
    back = repvgg.load(path)
    assert type(back) is type(model)
    assert_same_tensors(back, model)
    assert torch.equal(logits(back, side), logits(model, side))
    assert zoo.manifest_of(back) == zoo.manifest_of(model)
    assert not any(m.training for m in back.modules())
    return back


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(FileError, match=reason) as caught:
        repvgg.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1
