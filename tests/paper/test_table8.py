"""Table 8 on a machine that is as fast as the paper's, and for real on small networks."""

from pathlib import Path

import pytest
from roads import make_camvid
from rounding import REPORTED

import repvgg
from repvgg.bench.models import Candidate, network
from repvgg.deploy.space_to_batch import SpaceToBatch
from repvgg.paper import speeds, table8
from repvgg.paper.numbers import TABLE8
from repvgg.paper.report import to_record
from repvgg.paper.result import NothingChosenError, PaperSettings
from repvgg.paper.speeds import Speed
from repvgg.paper.table8 import PRINTED


def settings(out: Path, **more: object) -> PaperSettings:
    given = {"out": out, "quick": True, "rounds": 1, "log": lambda line: None}
    return PaperSettings(**{**given, **more})  # type: ignore[arg-type]


def test_says_what_the_paper_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_papers_machine(candidate: Candidate, reference: Candidate, settings: PaperSettings) -> Speed:
        assert settings.input_size == 353
        seconds = [[1 / PRINTED[c.model].speed] * 3 for c in (candidate, reference)]
        return Speed(candidate.model, 16, (3, 353, 353), seconds[0], reference.name, seconds[1], 1_000_000, 2_000_000_000, 1, "")

    monkeypatch.setattr(speeds, "_time", on_the_papers_machine)
    monkeypatch.setattr(table8, "_engines", lambda settings: [])
    result = table8.run(settings(tmp_path, quick=False))
    table, forms, by_engine = result.tables
    assert len(table.rows) == len(forms.rows) == 6
    for row, cells in zip(TABLE8, table.rows, strict=True):
        assert cells[:4] == (row.printed, f"{row.miou:.2f}", f"{row.pixel_accuracy:.2f}", f"{row.speed:.1f}")
        assert float(cells[4]) == pytest.approx(row.speed, rel=0.01)
        assert str(cells[6]).startswith(cells[5])
        assert cells[7:] == ("1.0", "2.0")
    assert all(str(cells[4]).startswith("1.00x") for cells in forms.rows)
    assert by_engine.rows == []
    assert "images of 353 x 353 at batch 1:" in result.how


@pytest.mark.slow  # the tables are proved by the test above, training by the one below, space-to-batch by its own tests
def test_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed, and trained on made-up roads; every engine's space-to-batch gives what its dilated convolution gives."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    roads = make_camvid(tmp_path / "camvid", size=(24, 32))
    small = settings(tmp_path, models=("pspnet_repvgg_micro_fast",), data=f"camvid:{roads}", input_size=33)
    monkeypatch.setattr(table8, "_engines", lambda settings: ["eager", "onnxruntime"])
    monkeypatch.setattr(table8, "REFERENCE", "pspnet_repvgg_micro")
    monkeypatch.setattr(table8, "QUICK_SHAPE", (8, 9, 9))
    result = table8.run(small)
    record = to_record(result, small)
    assert len(record["tables"]) == 4  # type: ignore[arg-type]
    assert [d["engine"] for d in result.data["dilated"]] == ["eager", "onnxruntime"]
    assert all(d["error"] < REPORTED for d in result.data["dilated"])
    overlap = result.data["overlaps"]["pspnet_repvgg_micro_fast"]
    assert (overlap["split"], overlap["epochs"]) == ("test", 2)
    assert 0 <= overlap["mean_iou"] <= 1
    assert (tmp_path / "table8-quick/pspnet_repvgg_micro_fast/best.safetensors").exists()
    shown = next(t for t in result.tables if t.title.startswith("Trained on"))
    assert shown.rows[0][0] == "pspnet_repvgg_micro_fast"


def test_backbones_start_from_the_classifiers_that_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log names it; that its tensors are in the saved model: train/test_segmentation.py."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    classifier = repvgg.create_model("repvgg_micro", num_classes=3)
    repvgg.save(classifier, tmp_path / "classifier.safetensors")
    roads = make_camvid(tmp_path / "camvid", size=(24, 32))
    said: list[str] = []
    given = settings(
        tmp_path, data=f"camvid:{roads}", init_backbone=("repvgg_b1g2", str(tmp_path / "classifier.safetensors")), log=said.append
    )
    figures = table8._trained("pspnet_repvgg_micro", given)
    assert figures["init"] == str(tmp_path / "classifier.safetensors")
    assert any("tensors in the backbone" in line for line in said)
    assert table8._backbone_of("pspnet_resnet50", given) == ""
    assert "no classifier given is a resnet50" in said[-1]


def test_which_models() -> None:
    assert table8.chosen(PaperSettings()) == list(PRINTED)
    assert table8.chosen(PaperSettings(quick=True)) == list(table8.QUICK)
    assert table8.chosen(PaperSettings(models=("PSPNet-RepVGG-A0-fast", "resnet18"))) == ["pspnet_repvgg_a0_fast"]
    with pytest.raises(NothingChosenError, match="none of resnet18 is a PSPNet"):
        table8.chosen(PaperSettings(models=("resnet18",)))


def test_what_is_timed_by_space_to_batch_has_no_dilated_convolution() -> None:
    model, left = network(Candidate("pspnet_repvgg_micro", form="space_to_batch"))
    assert left == 0
    assert sum(isinstance(m, SpaceToBatch) for m in model.modules()) == 2
    assert Candidate("pspnet_repvgg_micro", form="space_to_batch").name == "pspnet_repvgg_micro eager fp32 by space-to-batch"
