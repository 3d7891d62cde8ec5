"""The short forms of fuzz.py (`make sanitize`) and soak.py (`make soak`)."""

from pathlib import Path

import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from fuzz import fuzz_files, fuzz_layers, fuzz_pictures, fuzz_plans
from soak import MOST_GROWTH, soak


def test_hostile_layers() -> None:
    assert 50 < fuzz_layers(800, seed=0) < 800


def test_hostile_files(tmp_path: Path) -> None:
    assert 5 < fuzz_files(300, seed=0, folder=tmp_path) < 290


def test_hostile_plans(tmp_path: Path) -> None:
    assert 5 < fuzz_plans(300, seed=0, folder=tmp_path) < 290


def test_hostile_pictures() -> None:
    assert 100 < fuzz_pictures(800, seed=0) < 790


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_random_calls_keep_memory_flat(tmp_path: Path) -> None:
    calls, growth = soak(2, seed=0, path=tmp_path / "net.safetensors")
    assert calls > 20
    assert growth < MOST_GROWTH
