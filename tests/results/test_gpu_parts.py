"""The parts of results/gpu.py: its records, its packed data, a run that goes on, and what the page says of it."""

import copy
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import centred, randomize, varied

RESULTS = Path(__file__).parent.parent.parent / "results"


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    """Of a time that is over: whatever looks at the clock stops after its first piece of work."""
    from gpu_steps import Asked

    return Asked("cpu", tiny=True, data="digits", work=tmp_path / "work", until=0.0)


# ----------------------------------------------------------------------------------------------------------------- records


def test_an_error_is_told_and_tried_again_and_the_next_is_measured(
    tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_steps import Record

    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # imports the compiler, for seconds
    tried: list[str] = []

    def measure(name: str, error: Exception | None = None) -> dict[str, int]:
        tried.append(name)
        if error is not None:
            raise error
        return {"ratio": 5}

    path, later = tmp_path / "speed.json", replace(asked, until=1e12)
    units = [("a", lambda: measure("a", AttributeError("no compiler"))), ("b", lambda: measure("b"))]
    Record(path, later).each(later, iter(units))
    assert json.loads(path.read_text())["figures"] == {"a": {"error": "AttributeError: no compiler"}, "b": {"ratio": 5}}
    units[0] = ("a", lambda: measure("a"))
    Record(path, asked).each(asked, iter(units))
    assert tried == ["a", "b"]  # the time was over
    Record(path, later).each(later, iter(units))
    assert tried == ["a", "b", "a"]
    assert json.loads(path.read_text())["figures"] == {"a": {"ratio": 5}, "b": {"ratio": 5}}


def test_what_ended_its_process_comes_last_the_next_time(tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_steps import Record

    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    path, later, tried = tmp_path / "speed.json", replace(asked, until=1e12), list[str]()

    def crash() -> None:
        tried.append("crash")
        raise SystemExit

    def measure() -> dict[str, int]:
        tried.append("b")
        return {"ratio": 5}

    units = [("a", crash), ("b", measure)]
    for _ in range(2):
        with pytest.raises(SystemExit):
            Record(path, later).each(later, iter(units))
    assert tried == ["crash", "b", "crash"]
    assert json.loads(path.read_text())["figures"] == {
        "a": {"error": "its process ended before it was measured", "until": 1e12},
        "b": {"ratio": 5},
    }


def test_figures_of_other_settings_are_kept_under_another_name(tmp_path: Path, asked: Any) -> None:
    from gpu_steps import Record

    path = tmp_path / "cifar10.json"
    Record(path, asked).put("a", {"first": 1})
    for i, other in enumerate((replace(asked, data="other.npz"), replace(asked, data="other.npz", tiny=False)), 1):
        record = Record(path, other)
        assert record.figures == {}
        record.put("a", {"later": i})
    kept = [json.loads((tmp_path / name).read_text())["figures"]["a"] for name in ("cifar10.1.json", "cifar10.2.json")]
    assert kept == [{"first": 1}, {"later": 1}]
    assert Record(path, other).figures == {"a": {"later": 2}}


def test_every_row_of_tables_4_and_5_is_timed_in_the_papers_protocol_first(asked: Any) -> None:
    from gpu_steps import _speeds

    from repvgg.paper.numbers import TABLE4, TABLE5

    names = [name for name, _ in _speeds(replace(asked, tiny=False))]
    assert len(names) == len(set(names))
    first = [name for name in names if name.endswith("eager, fp32, batch 128, NCHW") and "training form" not in name]
    assert names[: len(first)] == first
    assert {row.model for row in (*TABLE4, *TABLE5)} == {model for name in first for model in name.split(",")[0].split(" over ")}


# ---------------------------------------------------------------------------------------------------------------- training


def job(tmp_path: Path, epochs: int) -> Any:
    from gpu_training import RECIPE, Job

    options = {"small_input": True, "width": 0.25}
    return Job("repvgg_micro", options, replace(RECIPE, epochs=epochs), 0, tmp_path / "runs" / "cifar10-0.json")


def test_a_run_goes_on_from_its_state_even_if_its_figures_were_lost(tmp_path: Path, asked: Any) -> None:
    from gpu_training import train

    two = job(tmp_path, 2)
    train(two, asked)
    run = json.loads(two.out.read_text())
    assert (len(run["top1_by_epoch"]), run["finished"]) == (1, False)
    train(two, asked)
    whole = two.out.read_text()
    run = json.loads(whole)
    assert (len(run["top1_by_epoch"]), run["finished"], run["compiled"]) == (2, True, False)
    assert run["folded"] == {"equal": 100, "images": 100}
    two.out.unlink()  # as a kill between the two files would have it
    train(two, asked)
    assert two.out.read_text() == whole


def test_predictions_that_folding_changes_are_counted(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_training

    from repvgg.models import zoo

    def wrong(net: Any) -> Any:
        other = copy.deepcopy(net)
        other.head.weight.data.neg_()
        return other

    data = gpu_training.read(asked)
    net = zoo.create_model("repvgg_micro", num_classes=10, in_chans=1, small_input=True, width=0.25)
    net = centred(randomize(net, (32, *data.held_out.shape[1:])), data.held_out)
    assert varied(gpu_training._predictions(net, data.held_out).bincount())
    assert gpu_training._folded(net, data) == {"folded": {"equal": 100, "images": 100}}
    monkeypatch.setattr(gpu_training, "reparameterize", wrong)
    assert gpu_training._folded(net, data)["folded"]["equal"] < 50


def test_what_is_recorded_of_runs(tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that fails is told of after the others are recorded; runs of other networks or data have files of their own."""
    import gpu_training
    from gpu_steps import Record

    started: list[str] = []

    class Process:
        def __init__(self, target: Any, args: Any) -> None:
            self.job, self.exitcode = args[0], int(args[0].seed == 1)
            started.append(self.job.out.name)

        def start(self) -> None:
            self.job.out.parent.mkdir(parents=True, exist_ok=True)
            if not self.exitcode:
                self.job.out.write_text(json.dumps({"seed": self.job.seed, "top1_by_epoch": [0.5], "finished": True}))

        def is_alive(self) -> bool:
            return False

        def join(self) -> None:
            pass

    server = SimpleNamespace(Process=Process, set_forkserver_preload=lambda modules: None)
    monkeypatch.setattr(gpu_training.multiprocessing, "get_context", lambda kind: server)  # type: ignore[attr-defined]
    record = Record(tmp_path / "ablation.json", asked)
    recipe = replace(gpu_training.RECIPE, epochs=1)

    def seeds(record: Any, width: float, **more: Any) -> list[str]:
        jobs = gpu_training._jobs(record, asked, "plain", "repvgg_b0", {"width": width}, recipe, 3)
        return [line for seed in range(3) for line in gpu_training._train(record, asked, "plain", jobs, seed, **more)]

    asked = replace(asked, until=time.time() + 60)
    assert seeds(record, 0.125, paper=72.39) == ["plain, seed 1: exit code 1"]
    f = record.figures["plain"]
    assert (f["finished"], f["n"], f["mean_top1"], f["paper"]) == (False, 2, 0.5, 72.39)
    seeds(record, 0.5)
    seeds(Record(tmp_path / "ablation.json", replace(asked, data="other.npz")), 0.5)
    assert len(set(started)) == len(started) == 9
    seeds(record, 0.5)
    assert len(started) == 10  # what is finished is left as it is
    asked = replace(asked, until=0.0)
    seeds(record, 0.25)
    assert len(started) == 10  # there is no time left
    with pytest.raises(RuntimeError, match="plain, seed 1: exit code 1"):
        gpu_training._refuse(["plain, seed 1: exit code 1"])


def test_every_block_has_its_first_seed_before_any_has_its_second(
    tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_training
    from gpu_steps import Record

    turns: list[tuple[str, int]] = []

    def trained(record: Any, asked: Any, name: str, jobs: Any, seed: int, **_: Any) -> list[str]:
        assert [job.seed for job in jobs] == [0, 1, 2]
        turns.append((name, seed))
        return [f"{name}: exit code 1"] if name == "acb" else []

    monkeypatch.setattr(gpu_training, "_train", trained)
    with pytest.raises(RuntimeError, match="acb: exit code 1"):
        gpu_training.ablation(Record(tmp_path / "ablation.json", asked), replace(asked, tiny=False))
    assert [name for name, _ in turns[:4]] == ["plain", "no_1x1", "no_identity", "repvgg"]
    assert [seed for _, seed in turns] == sorted(seed for _, seed in turns)
    assert len(turns) == len(set(turns)) == 33


@pytest.mark.slow
def test_a_compiled_step_is_the_step(tmp_path: Path) -> None:
    from gpu_steps import Stepper

    from repvgg.models import zoo
    from repvgg.train.recipes import Recipe

    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = []
    for mode in ("", "reduce-overhead"):
        torch.manual_seed(0)
        step = Stepper(zoo.create_model("repvgg_micro", num_classes=4, width=0.25), Recipe(), "cpu", mode)
        losses.append(torch.stack([step(x, y, 0.05) for _ in range(3)]))
    assert losses[0][2] != losses[0][0]
    assert torch.allclose(losses[0], losses[1], rtol=1e-3)


def test_where_nothing_can_be_compiled_training_goes_on(tmp_path: Path, asked: Any) -> None:
    from gpu_steps import Stepper
    from gpu_training import _epoch_or_uncompiled, read

    from repvgg.models import zoo

    two, data = job(tmp_path, 2), read(asked)
    stepper = Stepper(zoo.create_model("repvgg_micro", num_classes=10, in_chans=1, **two.options), two.recipe, "cpu")

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C compiler")

    stepper.network = broken
    _epoch_or_uncompiled(stepper, data, two, 0)
    assert stepper.network is stepper.model


def test_images_are_shifted_with_black_around_them(tmp_path: Path, asked: Any) -> None:
    """Black is black before the channels are normalised, as it is in `repvgg train`."""
    from gpu_steps import Stepper
    from gpu_training import RECIPE, _epoch, read

    from repvgg.models import zoo

    data, seen = read(asked), list[torch.Tensor]()
    options: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "small_input": True, "width": 0.25}
    stepper = Stepper(zoo.create_model("repvgg_micro", **options), RECIPE, "cpu")
    stepper.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    _epoch(stepper, data, job(tmp_path, 1), 0)
    darkest = data.normalised(torch.zeros(1, 1, 1, 1, dtype=torch.uint8))
    shown = torch.cat(seen)
    assert shown.shape == (256, 1, *data.held_out.shape[2:])
    assert shown.min() == darkest
    unshifted = data.normalised(data.train.batch(torch.arange(256))[0])
    assert 0 < sum(any(torch.equal(a, b) for b in unshifted) for a in shown) < 128  # one of 25 shifts is none


# -------------------------------------------------------------------------------------------------------------------- data


def test_packed_data_in_parts_are_the_data(tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_training

    monkeypatch.setattr(gpu_training, "PART", 50_000)
    gpu_training.pack("digits", tmp_path / "digits.npz")
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) > 2
    assert files[0].name == "digits-00.npz"
    assert all(file.stat().st_size < 50_000 for file in files)
    whole = replace(asked, tiny=False)
    packed = gpu_training.read(replace(whole, data=str(tmp_path / "digits-*.npz")))
    given = gpu_training.read(whole)
    for name in ("held_out", "held_out_labels", "mean", "deviation"):
        assert torch.equal(getattr(packed, name), getattr(given, name))
    assert torch.equal(packed.train.rows, given.train.rows)
    assert torch.equal(packed.train.labels, given.train.labels)
    head = subprocess.run(["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert (tmp_path / "COMMIT").read_text().strip().removesuffix("+") == head.stdout.strip()
    files[1].unlink()
    with pytest.raises(ValueError, match=r"digits-00\.npz is not one of"):
        gpu_training.read(replace(whole, data=str(tmp_path / "digits-*.npz")))
    assert np.load(files[0])["parts"] == len(files)


# --------------------------------------------------------------------------------------------------------------- the words


def test_the_words_of_what_was_not_finished(tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps
    import gpu_words
    from gpu_steps import Record, _pair
    from gpu_training import train

    from repvgg.bench.models import Candidate

    pytest.importorskip("psutil")
    two = job(tmp_path, 2)
    train(two, asked)
    runs = [json.loads(two.out.read_text())]
    figures = {"finished": False, "n": 1, "epochs": 2, "paper": 72.39, "runs": runs}
    figures["options"] = {"width": 0.25}
    trained = {"figures": {"plain": figures, "repvgg": {**figures, "n": 0, "runs": []}}}
    said = gpu_words.ablation(trained)
    assert "| `plain` | 72.39% | none yet | 1 | 2 (stopped after 1) |" in said
    assert "| `repvgg` | 72.39% | none yet | 0 | 2 (not begun) |" in said
    assert "stopped after 1" in gpu_words.cifar10(trained)

    record = Record(tmp_path / "speed.json", asked)
    pair = (Candidate("repvgg_micro", form="training"), Candidate("repvgg_micro"))
    record.put("a pair", _pair(pair, 1.5, asked, 128, nhwc=False, side=32))
    monkeypatch.setitem(gpu_steps.WRONG, "fp32", 0.0)  # as if a rounding error were none
    with pytest.raises(ValueError, match="repvgg_micro in eager is off by"):
        _pair(pair, 1.5, asked, 128, nhwc=False, side=32)
    record.put("another", {"error": "no compiler"})
    read = json.loads((tmp_path / "speed.json").read_text())
    assert len(read["figures"]["a pair"]["rows"][0]["seconds_per_batch_by_round"]) == read["figures"]["a pair"]["rounds"] == 2
    assert not read["figures"]["a pair"]["batch_unequal"]
    assert "| a pair | 1.50 | " in gpu_words.speed(read)
    assert "Could not be measured: another." in gpu_words.speed(read)
    read["figures"]["a pair"]["rows"][0]["batch_size"] = 1
    read["figures"]["a pair"]["batch_unequal"] = True
    for words in (gpu_words.speed(read), gpu_words.pspnet(read)):
        assert "(unequal batches: 2 and 1)" in words
    both = {"ours": 2**21, "timm": 2**20}
    step = {
        "rounds": 6,
        "ratio": {"value": 2.0, "low": 1.9, "high": 2.1},
        "images_per_second": both,
        "memory_bytes": both,
        "batch_size": 128,
    }
    said = gpu_words.training({"figures": {"repvgg_a0, fp32": step, "repvgg_b1, fp32": {"error": "out of memory"}}})
    assert "| repvgg_a0, fp32 | 2.00 (1.90 to 2.10) | 2,097,152 and 1,048,576 | 2 and 1 | 128 |" in said
    assert "Could not be measured: repvgg_b1, fp32." in said
