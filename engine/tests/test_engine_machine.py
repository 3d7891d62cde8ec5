"""What containers allow, for both versions of cgroups; and processors told apart."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from repvgg_engine import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of our own in place of /sys/fs/cgroup, and 8 processors."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_groups(groups: Path) -> None:
    assert machine.available_threads() == 8
    assert machine.available_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 8), ("100000 100000", 1), ("250000 100000", 2), ("50000 100000", 1)])
def test_version_2(groups: Path, quota: str, threads: int) -> None:
    """The least of all groups up to the root counts."""
    put(groups / "own", "0::/service/worker\n")
    put(groups / "cgroup/service/cpu.max", quota)
    put(groups / "cgroup/service/worker/cpu.max", "max 100000")
    put(groups / "cgroup/service/memory.max", "max")
    put(groups / "cgroup/service/worker/memory.max", str(64 << 20))
    assert machine.available_threads() == threads
    assert machine.available_memory() == 64 << 20


@pytest.mark.parametrize(("quota", "threads"), [("-1", 8), ("100000", 1), ("300000", 3)])
def test_version_1(groups: Path, quota: str, threads: int) -> None:
    put(groups / "own", "3:cpu,cpuacct:/box\n2:memory:/box\n")
    put(groups / "cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", quota)
    put(groups / "cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000")
    put(groups / "cgroup/memory/box/memory.limit_in_bytes", str(128 << 20))
    assert machine.available_threads() == threads
    assert machine.available_memory() == 128 << 20


def test_processors_of_one_brand_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    names = set()
    for model in (1, 17):
        put(
            tmp_path / "cpuinfo",
            f"vendor_id : AuthenticAMD\ncpu family : 25\nmodel : {model}\nmodel name : AMD EPYC\n\nmodel : 3\n",
        )
        names.add(machine.processor())
    assert len(names) == 2
    if sys.platform == "linux":
        monkeypatch.undo()
        assert machine.processor()
