"""What tests of data share: a cache of their own."""

from pathlib import Path

import pytest

from repvgg.data import open_source


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_source.cache_clear()
