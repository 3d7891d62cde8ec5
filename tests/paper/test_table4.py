"""Tables 4 and 5 on a machine that is as fast as the paper's: then ours must say what the paper says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomize, varied
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from repvgg import create_model, load, save
from repvgg.bench.models import Candidate
from repvgg.data import Source, open_source
from repvgg.deploy import engines
from repvgg.measure.costs import cost
from repvgg.models.baselines import create_baseline
from repvgg.models.names import BASELINES, FAMILY
from repvgg.models.repvgg import RepVGG
from repvgg.paper import speeds, table4, table5
from repvgg.paper.numbers import HEADLINES, TABLE4, TABLE5
from repvgg.paper.result import PaperSettings, Result
from repvgg.paper.speeds import Speed
from repvgg.paper.table4 import PRINTED

CHEAP = ("repvgg_a0", "repvgg_a1", "repvgg_a2", "repvgg_b0", "resnet18", "resnet34", "resnet50", "efficientnet_b0", "repvgg_b3")


def on_the_papers_machine(candidate: Candidate, reference: Candidate, settings: PaperSettings) -> Speed:
    import torch

    model, size = candidate.model, 224 if candidate.model in FAMILY else BASELINES[candidate.model].input_size
    with torch.device("meta"):
        network = RepVGG(FAMILY[model], deploy=True) if model in FAMILY else create_baseline(model)
    counted = cost(network, (3, size, size))
    seconds = [[1 / PRINTED[c.model].speed] * 3 for c in (candidate, reference)]
    return Speed(
        model, 128, (3, size, size), seconds[0], reference.name, seconds[1], counted.params, counted.macs, counted.winograd_muls, ""
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result]:
    pytest.importorskip("timm")
    wanted = PaperSettings(
        engine="eager", models=(*CHEAP, "regnetx_120"), batch_size=128, out=tmp_path_factory.mktemp("paper"), log=lambda line: None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speeds, "_time", on_the_papers_machine)
        return table4.run(wanted), table5.run(wanted)


def test_rows_say_what_the_paper_says(both: tuple[Result, Result]) -> None:
    for result, printed in zip(both, (TABLE4, TABLE5), strict=True):
        rows = {row.printed: row for row in printed if row.model in (*CHEAP, "regnetx_120")}
        table = result.tables[0]
        assert [cells[0] for cells in table.rows] == list(rows)
        for name, top1, paper, here, engine, quartiles, over, measured, _, flops, muls in table.rows:
            row = rows[name]
            assert top1 == f"{row.top1:.2f}"
            assert paper == here == f"{row.speed:,}"
            assert engine == "eager"
            assert quartiles == f"{here} to {here}"
            assert str(measured).startswith(over)
            assert flops == f"{row.flops_b:.1f}"
            if name == "RegNetX-12GF":
                assert muls == "9.9 (paper 10.9)"
            elif row.muls_b is not None:
                assert muls == f"{row.muls_b:.1f}"


def test_params_are_the_papers_where_there_are_no_batch_norms_to_fold(both: tuple[Result, Result]) -> None:
    """(The comparators are counted unfolded here, to be quick; test_baselines folds them.)"""
    shown = {cells[0]: cells[8] for result in both for cells in result.tables[0].rows}
    for row in (*TABLE4, *TABLE5):
        if row.model in FAMILY and row.printed in shown:
            assert shown[row.printed] == f"{row.params_m:.2f}"


def test_headlines(both: tuple[Result, Result]) -> None:
    for result, models in zip(both, (CHEAP[:-1], ("repvgg_b3", "regnetx_120")), strict=True):
        headlines = [h for h in HEADLINES if h.fast in models and h.slow in models]
        rows = result.tables[1].rows
        assert [row[0] for row in rows] == [f"{PRINTED[h.fast].printed} over {PRINTED[h.slow].printed}" for h in headlines]
        for h, measured in zip(headlines, result.data["headlines"], strict=True):
            assert measured["measured"]["ratio"] == pytest.approx(h.ratio, abs=0.01)
            assert measured["pair"]["reference"].split()[0] == h.slow  # they took turns with each other
    assert "4 of 4 hold, 4 by at least 95% of what they do in the paper" in both[0].why
    assert "1 of 1 hold" in both[1].why


@pytest.mark.slow  # test_fastest.py proves the choice
def test_each_model_in_its_own_fastest_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really chosen and timed, of two engines: native has plain networks alone, so the ResNet stays in eager."""
    pytest.importorskip("timm")
    pytest.importorskip("repvgg_engine")
    monkeypatch.setattr(engines, "installed", lambda *_: ["eager", "native"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    two = PaperSettings(
        engine="best", models=("repvgg_a0", "resnet18"), batch_size=1, rounds=2, input_size=32, out=tmp_path, log=lambda line: None
    )
    result = table4.run(two)
    chosen = {row[0]: row[4] for row in result.tables[0].rows}
    kept = {tuple(sorted(json.loads(file.read_text())["engines"])) for file in (tmp_path / "repvgg" / "engines").iterdir()}
    assert kept == {("eager", "native"), ("eager",)}
    assert chosen["ResNet-18"] == "eager"
    assert chosen["RepVGG-A0"] in ("eager", "native")
    assert result.data["headlines"][0]["measured"]["ratio"] > 0
    assert "each model's fastest engine" in result.how or set(chosen.values()) == {"eager"}


def test_correlations(both: tuple[Result, Result]) -> None:
    found = both[0].data["rank_correlation"]
    assert found["models"] == 7  # EfficientNet has no count of MULs
    for what in ("FLOPs", "Winograd MULs"):
        assert found[what]["here"] == pytest.approx(found[what]["paper"])
    assert found["Winograd MULs"]["paper"] <= found["FLOPs"]["paper"] < -0.9


def test_a_machine_that_slowed_down_for_one_pair_changes_no_correlation(both: tuple[Result, Result]) -> None:
    speeds = {speed["model"]: Speed(**speed) for speed in both[0].data["speeds"]}
    rows = [row for row in TABLE4 if row.model in speeds]
    b0 = speeds["repvgg_b0"]
    slowed = replace(b0, seconds=[9 * s for s in b0.seconds], reference_seconds=[9 * s for s in b0.reference_seconds])
    assert slowed.images_per_second < speeds["repvgg_a2"].images_per_second < b0.images_per_second
    assert table4._correlations(rows, {**speeds, "repvgg_b0": slowed}) == both[0].data["rank_correlation"]


def test_states_the_protocol_and_what_was_lowered(both: tuple[Result, Result]) -> None:
    for result in both:
        assert "at batch 128: medians and quartiles of 10 rounds" in result.how
    lowered = {"repvgg_a0": Speed("repvgg_a0", 4, (3, 224, 224), [1], "r", [1], 1, 1, 1, "")}
    assert "at batch 8 (where memory ran out: repvgg_a0 4)" in table4.protocol(lowered, PaperSettings(batch_size=8))


def test_top1_of_models_that_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, said = open_source("digits"), list[str]()
    torch.manual_seed(0)
    for name, width in (("repvgg_a0", 0.25), ("repvgg_micro", 0.25)):
        model = create_model(name, num_classes=10, in_chans=1, small_input=True, width=width)
        save(randomize(model, (16, 1, 16, 16)), tmp_path / f"{name}.safetensors", preprocessing=source.preprocessing)
    wanted = PaperSettings(
        engine="eager",
        models=("repvgg_a0",),
        batch_size=128,
        data="digits",
        weights=(f"{tmp_path}/repvgg_a0.safetensors", f"{tmp_path}/repvgg_micro.safetensors"),
        out=tmp_path,
        log=said.append,
    )
    monkeypatch.setattr(speeds, "_time", on_the_papers_machine)
    table = table4.run(wanted).tables[1]
    a0 = load(tmp_path / "repvgg_a0.safetensors")
    mean, std = source.preprocessing.mean[0], source.preprocessing.std[0]
    with torch.no_grad():
        logits = a0((torch.stack([resize(image, [16, 16]) for image, _ in whole(source)]).float() / 255 - mean) / std)
    assert varied(logits.argmax(1).bincount())
    right = [answer == label for answer, (_, label) in zip(logits.argmax(1).tolist(), whole(source), strict=True)]
    assert table.title == "Top-1 on digits, deploy form"
    assert table.rows == [("RepVGG-A0", "72.41", f"{100 * sum(right) / 360:.2f}", f"{tmp_path}/repvgg_a0.safetensors", "360")]
    assert [line for line in said if "repvgg_micro.safetensors: is a repvgg_micro" in line]
    with pytest.raises(ValueError, match="--weights: name what to compute"):
        table4.run(replace(wanted, data=""))


def whole(source: Source) -> list[tuple[Tensor, int]]:
    return [source.val[i] for i in range(len(source.val))]
