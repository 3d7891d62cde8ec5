"""What containers allow, for both versions of cgroups; and processors told apart."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from repvgg_engine import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of our own in place of /proc and /sys."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    return tmp_path


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_groups(groups: Path) -> None:
    assert machine.available_threads() == processors()
    assert machine.available_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", 99), ("100000 100000", 1), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_version_2(groups: Path, quota: str, threads: int) -> None:
    """The least of all groups up to the root counts."""
    put(groups / "proc/self/cgroup", "0::/service/worker\n")
    put(groups / "sys/fs/cgroup/service/cpu.max", quota)
    put(groups / "sys/fs/cgroup/service/worker/cpu.max", "max 100000")
    put(groups / "sys/fs/cgroup/service/memory.max", "max")
    put(groups / "sys/fs/cgroup/service/worker/memory.max", str(64 << 20))
    assert machine.available_threads() == min(threads, processors())
    assert machine.available_memory() == 64 << 20


def threads_in(words: list[str]) -> int:
    """What a process started by these words takes by default."""
    script = "from repvgg_engine.machine import available_threads; print(available_threads())"
    folder = str(Path(repvgg_engine.__file__).parent.parent)
    done = subprocess.run([*words, sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    return int(done.stdout)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset here")
def test_on_one_processor() -> None:
    first = min(os.sched_getaffinity(0))
    assert threads_in(["taskset", "-c", str(first)]) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="no Linux, or no C compiler")
def test_more_processors_than_the_set_holds(tmp_path: Path) -> None:
    """The system refuses to say which are this process's: then all count."""
    (tmp_path / "set.c").write_text("int sched_getaffinity(int p, unsigned long n, void *s) { return -1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", tmp_path / "set.so", tmp_path / "set.c"], check=True)
    if processors() != os.cpu_count():
        pytest.skip("this process has not all processors")
    assert threads_in(["env", f"LD_PRELOAD={tmp_path / 'set.so'}"]) == threads_in(["env"])


def test_in_a_container() -> None:
    """A real group, where this process may make one: by default as many threads as it has time for."""
    group, period = Path(f"/sys/fs/cgroup/cpu/repvgg-{os.getpid()}"), 100000
    try:
        group.mkdir()
    except OSError:
        pytest.skip("groups of version 1 cannot be made here")
    try:
        for quota, threads in ((period, 1), (period * 3 // 2, 1), (period * 64, processors())):
            (group / "cpu.cfs_quota_us").write_text(str(quota))
            assert threads_in(["sh", "-c", f'echo $$ > {group}/tasks; exec "$@"', "sh"]) == threads
    finally:
        group.rmdir()


@pytest.mark.parametrize(("quota", "threads"), [("-1", 99), ("100000", 1), ("300000", 3)])
def test_version_1(groups: Path, quota: str, threads: int) -> None:
    put(groups / "proc/self/cgroup", "3:cpu,cpuacct:/box\n2:memory:/box\n")
    put(groups / "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", quota)
    put(groups / "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000")
    put(groups / "sys/fs/cgroup/memory/box/memory.limit_in_bytes", str(128 << 20))
    assert machine.available_threads() == min(threads, processors())
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


def test_blas_has_its_threads_back() -> None:
    """Whoever of several comes first, and goes last."""
    library = next((Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas*"), None)
    if library is None:
        pytest.skip("NumPy has another library")
    blas = ctypes.CDLL(str(library))
    before = blas.scipy_openblas_get_num_threads64_()
    blas.scipy_openblas_set_num_threads64_(2)
    try:
        first, second = machine.one_blas_thread(), machine.one_blas_thread()
        with ThreadPoolExecutor(2) as pool:
            pool.submit(first.__enter__).result()
            pool.submit(second.__enter__).result()
            assert blas.scipy_openblas_get_num_threads64_() == 1
            pool.submit(first.__exit__, None, None, None).result()
            assert blas.scipy_openblas_get_num_threads64_() == 1
            if hasattr(os, "fork"):
                child = os.fork()
                if child == 0:
                    os._exit(blas.scipy_openblas_get_num_threads64_())
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
            pool.submit(second.__exit__, None, None, None).result()
        assert blas.scipy_openblas_get_num_threads64_() == 2
    finally:
        blas.scipy_openblas_set_num_threads64_(before)
