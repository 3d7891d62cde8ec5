"""train/distributed.py: processes that torchrun starts, on 127.0.0.1: equal to one, and restarted where one is killed."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import equality
import psutil
import pytest
import torch
import torch.distributed as dist
from forks import Forks, Started
from ranks import COMMAND, ENV, TORCHRUN, WORDS, both, environment, free_port, run, start_both, torchrun, weights
from safetensors.torch import load_file

from repvgg.train.distributed import ALONE, joined, local_device


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """Two processes, 21 steps."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    first, second = both(forks, [*WORDS, str(out)], out.parent)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (first.out.count("best val top-1"), second.out) == (1, "")  # one process speaks
    return out


def test_two_processes_equal_one(tmp_path: Path, forks: Forks) -> None:
    """Float64, batch norms still, the same global batches of 13 images, and an evaluation of 241: what two do not divide."""
    equality.main(tmp_path)  # alone, here
    ended = both(forks, f"import equality, pathlib; equality.main(pathlib.Path({str(tmp_path)!r}))", tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    alone, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert int(alone["confusion"].sum()) == 241
    assert torch.equal(alone["confusion"], first["confusion"])
    for name, tensor in alone.items():
        assert float((tensor.double() - first[name].double()).abs().max()) <= 1e-10, name
    moved = [name for name in alone if name.startswith("momentum.")]
    assert len(moved) > 20


def test_the_run_of_two_is_a_run(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["processes"] == 2
    metrics = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "val_top1" in line] == [7, 14, 21]


AGENT = """
from repvgg import cli
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
where = {"rdzv_backend": "static", "rdzv_endpoint": "127.0.0.1:%d", "rdzv_configs": {"rank": 0, "timeout": 60}}
elastic_launch(LaunchConfig(1, 1, 2, max_restarts=2, start_method="fork", **where), cli.main)(%r)
"""


@contextmanager
def agent_at_work(forks: Forks, out: Path) -> Iterator[Started]:
    """What torchrun runs, with its two processes as forks, once they have saved a state."""
    with forks.start(AGENT % (free_port(), [*WORDS, str(out)]), out.parent) as agent:
        while not any(int(p.stem) >= 4 for p in (out / "state").glob("[0-9]*.safetensors")):
            assert agent.poll() is None, agent.said()
            time.sleep(0.005)
        yield agent


def workers_of(agent: int) -> list[psutil.Process]:
    workers: list[psutil.Process] = psutil.Process(agent).children()
    assert len(workers) == 2
    return workers


def test_a_worker_that_is_killed_is_started_again_and_the_result_is_the_same(
    undisturbed: Path, tmp_path: Path, forks: Forks
) -> None:
    out = tmp_path / "run"
    with agent_at_work(forks, out) as agent:
        workers_of(agent.pid)[-1].send_signal(signal.SIGKILL)
        ended = agent.wait()
    assert ended.code == 0, ended.err
    assert "goes on after step" in ended.err
    a, b = weights(out), weights(undisturbed)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.slow  # the test above proves the point
def test_under_torchrun_too(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = torchrun(*COMMAND, str(out), restarts=2)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV) as agent:
        while not any(int(p.stem) >= 4 for p in (out / "state").glob("[0-9]*.safetensors")):
            assert agent.poll() is None
            time.sleep(0.005)
        workers_of(agent.pid)[-1].send_signal(signal.SIGKILL)
        _, said = agent.communicate(timeout=300)
    assert agent.returncode == 0, said
    assert "goes on after step" in said
    a, b = weights(out), weights(undisturbed)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.slow  # test_a_worker_that_is_killed_is_started_again_and_the_result_is_the_same proves the point
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """Before they meet, while they do, in the midst of a step or a save, at the very end."""
    random, out = Random(seed), tmp_path / "run"
    summary = json.loads((undisturbed / "summary.json").read_text())
    with subprocess.Popen(torchrun(*COMMAND, str(out), restarts=3), stderr=subprocess.PIPE, text=True, env=ENV) as agent:
        time.sleep(random.uniform(0.5, 10 + summary["seconds"]))
        workers = [p for p in psutil.Process(agent.pid).children() if "repvgg" in p.cmdline()] if agent.poll() is None else []
        if workers:
            random.choice(workers).send_signal(signal.SIGKILL)
        _, said = agent.communicate(timeout=300)
    assert agent.returncode == 0, said
    a, b = weights(out), weights(undisturbed)
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    if not workers:
        pytest.skip("there was no worker to be killed")


def test_workers_end_when_their_agent_dies(tmp_path: Path, forks: Forks) -> None:
    with agent_at_work(forks, tmp_path / "run") as agent:
        workers = workers_of(agent.pid)
        os.kill(agent.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
        assert f"the process that started this one ({agent.pid}) is gone\n" in agent.said()


def test_two_processes_stop_at_the_same_step_when_asked(tmp_path: Path, forks: Forks) -> None:
    with ExitStack() as stack:
        processes = start_both(forks, [*WORDS, str(tmp_path / "run")], tmp_path, stack)
        while not list((tmp_path / "run/state").glob("[0-9]*.safetensors")):
            assert processes[0].poll() is None
            time.sleep(0.005)
        os.kill(processes[1].pid, signal.SIGTERM)  # one is asked, and both stop
        ended = [process.wait() for process in processes]
    assert [process.code for process in ended] == [143, 143], ended
    steps = [re.findall(r"repvgg.*: stopped after step (\d+)", process.err) for process in ended]
    assert steps[0] == steps[1] != []


@pytest.mark.slow  # the worker that is killed and started again proves that two go on where they were
def test_two_processes_that_stopped_go_on(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(out)
    done = run(torchrun(*COMMAND, str(out)))
    assert done.returncode == 0, done.stderr
    a, b = weights(out), weights(undisturbed)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


def stopped(out: Path) -> None:
    """Two processes are asked to stop once they have saved a state."""
    command = torchrun(*COMMAND, str(out))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV) as agent:
        while not list((out / "state").glob("[0-9]*.safetensors")):
            assert agent.poll() is None
            time.sleep(0.005)
        agent.send_signal(signal.SIGTERM)
        _, said = agent.communicate(timeout=300)
    assert agent.returncode != 0
    assert "repvgg: stopped after step" in said


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """As after a machine has left a run of --nnodes 2:4: of a batch of 16 three processes take 5 or 6 images each."""
    out = tmp_path / "run"
    stopped(out)
    words = torchrun(*COMMAND, str(out))
    words[words.index("--nproc-per-node") + 1] = "3"
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["processes"] == 3


@pytest.mark.slow  # test_batches.py: test_a_batch_that_cannot_be_divided_is_refused proves the point
def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    done = run(torchrun(*COMMAND, str(tmp_path), "--batch-size", "1"))
    assert done.returncode != 0
    assert "repvgg: --batch-size 1 cannot be divided among 2 processes: 2 can\n" in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, forks: Forks) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with forks.start([*WORDS, str(tmp_path)], tmp_path, environment(0, port)) as process:
            done = process.wait()
    assert done.code == 2
    complaint = [line for line in done.err.splitlines() if line.startswith("repvgg:")]
    assert len(complaint) == 1
    assert complaint[0].startswith(f"repvgg: cannot meet the other processes at 127.0.0.1:{port} (")
    assert complaint[0].endswith("give torchrun another --master-port")
    assert "Traceback" not in done.err


def test_alone_nothing_is_exchanged() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.total(values) is values
    ALONE.wait()
    ALONE.copy_buffers(torch.nn.BatchNorm2d(2))
    assert ALONE.main


def test_a_group_that_is_there_is_joined_and_left_as_it_was() -> None:
    """As Ray Train makes one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with joined("cpu") as world:
            assert (world.rank, world.size, world.main) == (0, 1, True)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


SHARED = """
import sys
from pathlib import Path
import torch
from repvgg.data import DataError, folder, open_source
from repvgg.data.cache import found_by
from repvgg.train.distributed import joined
from repvgg.train.state import State, Store, shared
with joined("cpu") as world:
    assert shared(world, None) is None
    weight = torch.arange(24.0).view(1, 2, 3, 4).to(torch.bfloat16)
    state = State(7, {"weight": weight, "count": torch.tensor(3), "none": torch.zeros(0, 2)}, {"lr": 0.1, "name": "é"})
    store = Store(Path(sys.argv[1]) / "of the first one")
    if world.main:
        store.folder.mkdir()
        store.save_soon(state)
        store.wait()
    found = shared(world, store.latest() if world.main else None)
    assert (found.step, found.facts) == (7, {"lr": 0.1, "name": "é"})
    for name, tensor in state.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor), name
    assert world.agree(world.rank * 5) == 5
    if not world.main:
        folder._listing = None
    with found_by(world.once):
        source = open_source(sys.argv[2])
        assert (len(source.train), len(source.val), source.classes) == (6, 2, ["cat", "dog"])
        try:
            folder.Folder(Path(sys.argv[2]) / "val/cat")
            raise AssertionError
        except DataError as error:
            assert "val/cat: holds no class folders" in str(error)
"""


def test_the_first_process_reads_the_state_and_lists_the_images_for_all(tmp_path: Path, forks: Forks) -> None:
    for split, name in itertools.product(("train", "val"), ("cat/0", "cat/1", "dog/0", "cat/2", "dog/1", "dog/2")):
        path = tmp_path / f"photos/{split}/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if split == "train" or name.endswith("0"):
            path.touch()
    given = [str(tmp_path), str(tmp_path / "photos")]
    ended = both(forks, f"import sys; sys.argv[1:] = {given}\n{SHARED}", tmp_path)
    assert [process.code for process in ended] == [0, 0], ended


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(d) for d in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="makes network namespaces")
def test_two_machines_meet(undisturbed: Path, tmp_path: Path) -> None:
    """Two agents in network namespaces of their own, a cable between them, one c10d rendezvous."""
    names, out = ("repvgg-a", "repvgg-b"), tmp_path / "run"
    agents: list[subprocess.Popen[str]] = []

    def ip(*words: str) -> int:
        return subprocess.run(["ip", *words], capture_output=True).returncode

    try:
        if any(ip("netns", "add", name) for name in names):
            pytest.skip("no network namespaces here")
        ip("link", "add", "rv-a", "netns", names[0], "type", "veth", "peer", "name", "rv-b", "netns", names[1])
        for name, link, address in zip(names, ("rv-a", "rv-b"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            ip("-n", name, "address", "add", address, "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        for name, link in zip(names, ("rv-a", "rv-b"), strict=True):
            own, host = ("10.77.0.1", 1) if link == "rv-a" else ("10.77.0.2", 0)
            where = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29555 --rdzv-conf is_host={host}"
            meet = [*TORCHRUN, *where.split(), "--rdzv-id", "t", "--local-addr", own]
            command = ["ip", "netns", "exec", name, *meet, *COMMAND, str(out)]
            agents.append(subprocess.Popen(command, env={**ENV, "GLOO_SOCKET_IFNAME": link}, stderr=subprocess.PIPE, text=True))
        said = [agent.communicate(timeout=120)[1] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], said
    finally:
        for agent in agents:
            agent.kill()
        for name in names:
            ip("netns", "delete", name)
    a, b = weights(out), weights(undisturbed)
    assert all(torch.equal(t, b[name]) for name, t in a.items())
