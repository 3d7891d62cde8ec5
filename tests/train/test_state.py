"""train/state.py: what is saved comes back to the last bit, and what is damaged is noticed, whatever the damage."""

import json
from pathlib import Path

import pytest
import torch
from forks import Forks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from repvgg.disk import FileError
from repvgg.train.state import State, Store, _digest


def make(step: int) -> State:
    random = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 4, 3, 3, generator=random).contiguous(memory_format=torch.channels_last)
    tensors = {"model.weight": weight, "model.count": torch.tensor(step), "half": torch.randn(5, generator=random).bfloat16()}
    return State(step, tensors, {"seconds": 1.5, "settings": {"lr": 0.1}})


def equal(a: State | None, b: State) -> bool:
    assert a is not None
    same = a.tensors.keys() == b.tensors.keys() and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
    return same and (a.step, a.facts) == (b.step, b.facts)


def store(folder: Path) -> tuple[Store, list[str]]:
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    return Store(folder, said.append), said


def write(states: Store, state: State) -> None:
    states.save_soon(state)
    states.wait()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    states, said = store(tmp_path)
    assert states.latest() is None
    for step in (5, 10, 999_999_999):
        write(states, make(step))
        assert equal(states.latest(), make(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000010.safetensors", "999999999.safetensors"]
    assert said == []
    states.clear()
    assert states.latest() is None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("states")
    states, _ = store(folder)
    for step in (1, 2):
        write(states, make(step))
    return folder, (folder / "000000002.safetensors").read_bytes()


@given(st.data())
def test_any_damage_is_noticed_and_the_one_before_is_used(pair: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, whole = pair
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:place]
    else:
        damaged = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    (folder / "000000002.safetensors").write_bytes(damaged)
    states, said = store(folder)
    found = states.latest()
    if found is not None and found.step == 2:  # a blank in the header, say, means nothing
        assert equal(found, make(2))
    else:
        assert equal(found, make(1))
        assert len(said) == 1
        assert said[0].startswith(f"{folder / '000000002.safetensors'}: damaged, it is left out")
        assert "\n" not in said[0]


def test_when_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    states, said = store(tmp_path)
    for step in (1, 2):
        (tmp_path / f"{step:09d}.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileError, match="every state in it is damaged; --resume never starts over"):
        states.latest()
    assert len(said) == 2


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    states, _ = store(tmp_path)
    write(states, make(1))
    facts = json.dumps({"format": 99, "step": 2})
    tensors = make(2).tensors
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, tmp_path / "000000002.safetensors", {"facts": facts, "sha256": _digest(tensors, facts)})
    with pytest.raises(FileError, match=r"000000002\.safetensors: written by another version of repvgg"):
        states.latest()


def test_half_written_files_are_not_states(tmp_path: Path) -> None:
    states, _ = store(tmp_path)
    write(states, make(1))
    (tmp_path / ".000000002.safetensors.77.tmp").write_bytes(b"half")
    assert equal(states.latest(), make(1))


def test_what_the_user_put_beside_states_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path, log=str)
    (tmp_path / "2024-best.safetensors").write_text("precious")
    for step in range(4):
        store.save_soon(State(step, {}, {}))
    store.wait()
    assert (found := store.latest()) is not None
    assert found.step == 3
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["2024-best.safetensors"]


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, forks: Forks) -> None:
    """A real limit on file size, in a process of its own."""
    states, _ = store(tmp_path)
    write(states, make(1))
    code = f"""
import resource, signal, torch
from pathlib import Path
from repvgg.train.state import State, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store = Store(Path({str(tmp_path)!r}))
    store.save_soon(State(2, {{"x": torch.randn(1_000_000)}}, {{}}))
    store.wait()
except ValueError as error:
    print(error)
"""
    with forks.start(code, tmp_path) as process:
        done = process.wait()
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / '000000002.safetensors'}: cannot be written (")
    assert done.out.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["000000001.safetensors"]
    assert equal(states.latest(), make(1))
