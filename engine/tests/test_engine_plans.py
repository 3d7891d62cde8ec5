"""Plans that ship: the same bits wherever they go, and one line where they do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

from nets import images, model_file, plain_net
from repvgg_engine import EngineError, Net, Plan, instruction_sets, load, plan, plans, tune
from repvgg_engine.__main__ import main


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    return model_file(tmp_path / "net.safetensors", plain_net())


def of_algorithm(name: str, isa: str) -> Plan:
    """Every layer by that algorithm, or, where it has none, by its last."""
    known = Net(plain_net(), isa=isa).known
    return Plan(isa, "fp32", tuple(name if name in names else names[-1] if names else "" for names in known))


@pytest.mark.parametrize("isa", [name for name in instruction_sets() if name != "bf16"])
@pytest.mark.parametrize("algorithm", ["direct", "F2", "F4", "F5", "F6", "F7"])
def test_the_same_bits_alone_and_in_any_batch(path: Path, isa: str, algorithm: str) -> None:
    given, x = of_algorithm(algorithm, isa), images(9)
    alone = np.concatenate([load(path, plan=given, threads=1)(x[i : i + 1]) for i in range(9)])
    for threads in (1, 2, 3):
        net = load(path, plan=given, threads=threads)
        assert net.isa == isa
        for n in (2, 4, 9):
            assert np.array_equal(net(x[:n]), alone[:n])


def test_a_plan_goes_round(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    made = plan(path, threads=2)
    main(["plan", str(path), "--threads", "2"])
    file = tmp_path / "net.plan.json"
    file.write_text(capsys.readouterr().out)
    assert plans.read(file) == made
    monkeypatch.setattr(tune, "choose_algorithms", None)  # nothing is measured
    got = load(path, plan=file)(images())
    assert np.array_equal(got, load(path, plan=made, threads=1)(images()))
    assert np.allclose(got, load(path, accuracy="exact")(images()), atol=1e-4)
    features = load(path, plan=file, features=True)(images())
    assert features.shape == (4, 48, 8, 8)


def test_a_full_disk_leaves_no_half_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", fail)
    plans.keep("key", Plan("portable", "fp32", ()))
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_instruction_set(path: Path) -> None:
    """It is run by that one, or refused: other bits would be a surprise."""
    assert load(path, plan=of_algorithm("F4", "portable")).isa == "portable"
    with pytest.raises(EngineError, match="avx9: this processor has"):
        load(path, plan=Plan("avx9", "fp32", of_algorithm("F4", "portable").algorithms))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a plan"),
        ("[[[[", "is not a plan"),
        ("[]", "is not a plan"),
        ("[" * 100_000, "is not a plan"),
        ('{"repvgg_engine_plan": 2}', "version 2"),
        ('{"repvgg_engine_plan": 1, "isa": "avx2", "precision": "fp32", "algorithms": [1]}', "is not a plan"),
        ('{"repvgg_engine_plan": 1, "isa": "portable", "precision": "fp32", "algorithms": ["F4"]}', "of 1 layers, the net has 8"),
        (Plan("portable", "fp32", ("F3",) * 8).to_json(), "computes layer 0 by 'F3', which cannot be: direct, F2, F4"),
        (Plan("portable", "int9", ("",) * 8).to_json(), "no precision 'int9'"),
    ],
)
def test_what_is_no_plan(path: Path, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(EngineError, match=reason):
        load(path, plan=tmp_path / "plan.json")
    with pytest.raises(EngineError, match="No such file"):
        load(path, plan=tmp_path / "none.json")
