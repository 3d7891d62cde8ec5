"""The switches that float32 and repeatable runs on a GPU hang on; they can be set, and read, without one."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from repvgg.data import open_source
from repvgg.fold import proof
from repvgg.models import finite as finite_outputs
from repvgg.models import views
from repvgg.numerics import full_float32, repeatable
from repvgg.paper.grid import compare_forms
from repvgg.train import loop
from repvgg.train.evaluate import evaluate
from repvgg.train.recipes import Recipe


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = kept
    torch.use_deterministic_algorithms(False)


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_float32_on_cuda_has_no_tf32() -> None:
    full_float32("cpu")
    assert tf32() == (True, True)
    full_float32("cuda:0")
    assert tf32() == (False, False)


def test_a_run_on_cuda_can_be_repeated_and_what_follows_is_as_before() -> None:
    filled: Any = torch.utils.deterministic
    with repeatable("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()
    with suppress(RuntimeError), repeatable("cuda"):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert not filled.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise RuntimeError("it stops")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert filled.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    with repeatable("cuda"):
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_training_asks_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of the name "cuda" that is not there: the switches are set before it is first used."""
    seen: list[bool] = []

    def feed(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    monkeypatch.setattr(loop, "Feed", feed)
    with pytest.raises((RuntimeError, AssertionError)):
        loop.train("repvgg_micro", open_source("digits"), Recipe(), tmp_path, device="cuda", log=str)
    assert seen == [True]
    assert tf32() == (False, False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_evaluation_on_cuda_is_in_float32() -> None:
    evaluate(torch.nn.Flatten(), [(torch.zeros(2, 10, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda"))], 10)
    assert tf32() == (False, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_forms_of_a_grids_networks_are_compared_in_float32() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        compare_forms(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), open_source("digits"), "cuda")
    assert tf32() == (False, False)


@pytest.mark.parametrize("room", [views, finite_outputs])
def test_predictions_are_in_float32(room: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of masks and of labels, on the device of the images."""
    asked: list[torch.device] = []
    monkeypatch.setattr(room, "full_float32", asked.append)
    model, images = torch.nn.Conv2d(1, 1, 1).eval(), torch.zeros(1, 1, 4, 4)
    assert (views.placed(model, "cpu")(images) if room is views else finite_outputs.finite(model, images)).shape == images.shape
    assert asked == [torch.device("cpu")]


def test_proofs_are_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches are asked for on the device of the model that is judged."""
    asked: list[torch.device] = []
    monkeypatch.setattr(proof, "full_float32", asked.append)
    model = torch.nn.Conv2d(1, 1, 1).eval()
    assert proof.verify(model, model, (1, 4, 4)).ok
    assert asked == [torch.device("cpu")]
