"""bench/models.py: what is timed is what it says, and a wish that cannot be met is one clear line."""

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from repvgg.bench.models import BenchReport, Candidate, Prepared, bench, candidates, network, prepared, randomise_norms
from repvgg.cli.show_results import show_reports
from repvgg.deploy import engines
from repvgg.fold.as_linear import Branches
from repvgg.measure.timing import Times
from repvgg.models import zoo

MICRO = Candidate("repvgg_micro")
TRAINING = Candidate("repvgg_micro", form="training")


def quick(*wanted: Candidate, **options: Any) -> BenchReport:
    few = {"batch_size": 2, "rounds": 3, "batches": 2, "warmup": 1, "input_size": (3, 32, 32), "log": lambda line: None}
    return bench(wanted, **{**few, **options})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks that engines are built from."""
    seen: list[nn.Module] = []
    build = engines.build

    def watched(name: str, model: nn.Module, options: engines.Options) -> engines.Engine:
        seen.append(model)
        return build(name, model, options)

    monkeypatch.setattr(engines, "build", watched)
    return seen


def parts(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


# --------------------------------------------------------------------------------------------------------- what is timed


def test_threads_and_sizes_are_at_least_one() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"threads": 0}, "--threads 0"),
        ({"input_size": (3, 0, 0)}, "--input-size 0"),
    )
    for how, complaint in cases:
        with pytest.raises(ValueError, match=f"{complaint}: at least 1"):
            quick(MICRO, **how)


def test_a_pspnet_has_the_classes_of_table_8() -> None:
    assert network(Candidate("pspnet_repvgg_micro"))[0].num_classes == 19


def test_trap_8_what_is_timed_as_deploy_form_has_no_branches_left(built: list[nn.Module]) -> None:
    quick(MICRO, TRAINING)
    deploy, training = built
    assert parts(deploy, nn.BatchNorm2d) == parts(deploy, Branches) == 0
    assert parts(deploy, nn.Conv2d) == parts(training, Branches) == 10
    assert parts(training, nn.BatchNorm2d) == 25
    assert not any(m.training for model in built for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", pytest.param("efficientnet_b0", marks=pytest.mark.slow)])
def test_trap_9_baselines_are_folded(name: str, built: list[nn.Module]) -> None:
    pytest.importorskip("timm")
    row = quick(Candidate(name), rounds=1, batches=1, warmup=0).rows[0]
    assert parts(built[0], nn.BatchNorm2d) == row.left_unfolded == 0
    assert parts(built[0], nn.Conv2d) > 15


def test_a_candidate_with_another_block() -> None:
    plain, _ = network(Candidate("repvgg_micro", form="training", block="plain"))
    assert parts(plain, nn.Conv2d) == parts(plain, nn.BatchNorm2d) == 10
    assert Candidate("repvgg_micro", form="training", block="plain").name == "repvgg_micro eager fp32 plain blocks training form"


def test_random_norms_are_neither_fresh_nor_zero_and_keep_their_momentum() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any((m.weight == 0).all() for m in norms)
    assert randomise_norms(model) is model
    assert not model.training
    for m in norms:
        assert m.momentum == 0.1
        assert m.running_mean is not None
        assert m.running_var is not None
        assert m.weight.min() >= 0.5
        assert (m.running_var > 0).all()
        assert m.running_mean.unique().numel() > 1
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.isfinite().all()


# ---------------------------------------------------------------------------------------------------- figures and record


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return quick(MICRO, TRAINING)


def test_report(report: BenchReport) -> None:
    deploy, training = report.rows
    assert report.reference == MICRO
    assert (deploy.ratio.low, deploy.ratio.value, deploy.ratio.high) == (1, 1, 1)
    assert training.ratio.low <= training.ratio.value <= training.ratio.high
    for row in report.rows:
        assert [len(turn) for turn in row.times.rounds] == [2, 2, 2]
        low, high = row.spread
        assert 0 < low <= row.images_per_second <= high
    assert deploy.cost.macs < training.cost.macs
    assert deploy.cost.params < training.cost.params


def test_with_a_cache_a_network_is_folded_once_for_all_calls_and_engines(built: list[nn.Module]) -> None:
    prepare, said = functools.cache(prepared), list[Candidate]()

    def counted(*asked: Any) -> Prepared:
        said.append(asked[0])
        return prepare(*asked)

    first = quick(MICRO, Candidate("repvgg_micro", precision="bf16"), prepare=counted).rows
    again = quick(MICRO, TRAINING, prepare=counted, batch_size=1).rows
    assert said == [MICRO, MICRO, MICRO, TRAINING]
    assert prepare.cache_info().misses == 2
    assert built[0] is built[1] is built[2] is not built[3]
    assert first[0].cost == again[0].cost
    assert max(first[0].error, again[0].error) < 1e-3 < first[1].error


def test_json_record(report: BenchReport) -> None:
    record = json.loads(json.dumps(report.to_json()))
    assert record["reference"]["model"] == "repvgg_micro"
    assert (record["rounds"], record["batches_a_round"]) == (3, 2)
    assert {"processor", "cores", "threads", "versions", "commit", "date"} <= record["machine"].keys()
    for row, form in zip(record["rows"], ("deploy", "training"), strict=True):
        assert (row["model"], row["engine"], row["precision"], row["form"]) == ("repvgg_micro", "eager", "fp32", form)
        assert (row["batch_size"], row["input_size"], row["left_unfolded"]) == (2, [3, 32, 32], 0)
        assert len(row["seconds_per_batch_by_round"]) == 3
        assert row["macs"] > row["winograd_muls"] > row["params"] > 0
        assert {"value", "low", "high"} == row["ratio"].keys()


def test_each_model_has_its_own_input_size_and_names_in_the_papers_spelling_are_the_same() -> None:
    report = quick(Candidate("RepVGG-micro"), MICRO, input_size=None, batch_size=1, rounds=1, batches=1)
    assert [row.input_size for row in report.rows] == [(3, 224, 224)]


def test_table_marks_what_is_not_deploy_form(report: BenchReport, capsys: pytest.CaptureFixture[str]) -> None:
    show_reports([report], None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert sum("(training form)" in line for line in lines) == 1
    assert any("1.00x (1.00 to 1.00)" in line for line in lines)


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (Candidate("repvgg_a9"), r"no model 'repvgg_a9': did you mean [^\n]*repvgg_a0"),
        (Candidate("repvgg_micro", "tensorflow"), "no engine 'tensorflow': there are eager, compile"),
        (Candidate("repvgg_micro", "openvino", "fp16"), "has no fp16 on cpu: it has fp32, bf16|pip install"),
        (Candidate("repvgg_micro", precision="fp8"), "the engine eager has no fp8 on cpu: it has fp32, bf16, fp16"),
    ],
)
def test_unknown_names(wanted: Candidate, reason: str, built: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=reason):
        quick(MICRO, wanted)
    assert not built  # before anything runs


def test_a_missing_engine_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"the engine openvino needs onnx, onnxscript, openvino: pip install onnx onnxscript openvino"
    ):
        quick(Candidate("repvgg_micro", "openvino"))


def test_pairs_of_engine_and_precision_that_do_not_exist_are_left_out_with_a_word() -> None:
    words: list[str] = []
    pairs = candidates(["a", "b"], ["eager", "onnxruntime"], ["fp32", "bf16"], log=words.append)
    assert [(c.model, c.engine, c.precision) for c in pairs] == [
        (model, *pair) for model in "ab" for pair in (("eager", "fp32"), ("eager", "bf16"), ("onnxruntime", "fp32"))
    ]
    assert words == ["onnxruntime has no bf16 on cpu: left out"]
    with pytest.raises(ValueError, match=r"onnxruntime has no bf16 on cpu: it has fp32|pip install"):
        candidates(["a"], ["onnxruntime"], ["bf16"])


@pytest.mark.parametrize("name", ["batch_size", "rounds", "batches"])
def test_sizes_below_one(name: str) -> None:
    with pytest.raises(ValueError, match="at least"):
        quick(MICRO, **{name: 0})


class Unfoldable(nn.Module):
    """A batch norm after a ReLU has no convolution to go into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.bn(self.conv(x).relu())).flatten(1)  # type: ignore[no-any-return]


def test_what_does_not_fold_is_timed_only_when_asked_for_and_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "create_model", lambda name, **options: Unfoldable())
    with pytest.raises(ValueError, match=r"repvgg_micro: 1 batch norms? cannot be folded; --allow-unfolded"):
        quick(MICRO)
    report = quick(MICRO, allow_unfolded=True)
    assert report.rows[0].left_unfolded == 1
    assert report.to_json()["rows"][0]["left_unfolded"] == 1
    show_reports([report], None, as_json=False)
    assert "1 BN left" in capsys.readouterr().out


def test_an_engine_that_cannot_run_a_model_is_left_out_of_it() -> None:
    pytest.importorskip("repvgg_engine", exc_type=ImportError)
    pytest.importorskip("timm")
    words: list[str] = []
    native, resnet = Candidate("repvgg_micro", "native"), Candidate("resnet18", "native")
    report = quick(native, Candidate("resnet18"), resnet, rounds=1, batches=1, log=words.append)
    assert [(row.candidate.model, row.candidate.engine) for row in report.rows] == [
        ("repvgg_micro", "native"),
        ("resnet18", "eager"),
    ]
    assert any(word.startswith("left out: resnet18 native fp32 (the engine native runs plain networks") for word in words)
    with pytest.raises(ValueError, match="the engine native runs plain networks"):  # nothing else runs it
        quick(MICRO, resnet)


# ----------------------------------------------------------------------------------------------------------- out of memory


def running_out(above: int, error: BaseException) -> Callable[..., engines.Engine]:
    build = engines.build

    def limited(name: str, model: nn.Module, options: engines.Options) -> engines.Engine:
        if options.batch_size > above:
            raise error
        return build(name, model, options)

    return limited


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        ),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), marks=pytest.mark.slow),
        pytest.param(MemoryError("std::bad_alloc"), marks=pytest.mark.slow),  # which errors are of memory: test_memory.py
    ],
)
def test_a_batch_too_large_lowers_itself_with_a_word(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "build", running_out(2, error))
    words: list[str] = []
    report = quick(MICRO, batch_size=8, log=words.append, progress=lambda line: None)
    assert words == [f"repvgg_micro eager fp32: out of memory, trying batch {n}" for n in (4, 2)]
    assert report.rows[0].batch_size == 2
    assert report.rows[0].images_per_second == 2 / report.rows[0].times.median


def test_other_errors_and_a_single_image_too_large_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "build", running_out(0, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        quick(MICRO)
    monkeypatch.setattr(engines, "build", running_out(0, MemoryError()))
    with pytest.raises(MemoryError):
        quick(MICRO)


def test_a_smaller_batch_is_compared_by_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate whose batch was halved, and takes as long for it, is half as fast."""
    build = engines.build

    def limited(name: str, model: nn.Module, options: engines.Options) -> engines.Engine:
        if parts(model, Branches) and options.batch_size > 2:
            raise MemoryError
        return build(name, model, options)

    monkeypatch.setattr(engines, "build", limited)
    monkeypatch.setattr("repvgg.bench.models.interleave", lambda calls, **_: {name: Times([[1.0]] * 3) for name in calls})
    deploy, training = quick(MICRO, TRAINING, batch_size=4).rows
    assert (deploy.batch_size, training.batch_size) == (4, 2)
    assert (deploy.images_per_second, training.images_per_second) == (4, 2)
    assert training.ratio.value == 0.5
