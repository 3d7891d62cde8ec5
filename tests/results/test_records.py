"""results/records.py: each part of a record has a stamp of its own, which scripts leave alone and pages print."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import deploy_table
import layout
import measure_compatibility
import measure_engines
import measure_int8
import outdated
import pytest
import readme
import records
import sections
from records import keep, stamps

from repvgg import create_model
from repvgg.deploy.quantize import Quantization

RESULTS = Path(records.__file__).parent
HERE = {"processor": "AMD EPYC", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.0"}, "gpu": None}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is told of now: the commit and the date, which a test turns on."""
    now = {"commit": "aaaaaaa", "date": "2026-11-20T12:00:00+00:00"}
    monkeypatch.setattr(records, "this_machine", lambda device: {**HERE, **now})
    return now


def turn(clock: dict[str, str]) -> None:
    clock.update(commit="bbbbbbb", date="2026-11-22T12:00:00+00:00")


def days(path: Path, *parts: str) -> dict[str, str]:
    return {part: stamp["date"][:10] for part, stamp in stamps(json.loads(path.read_text()), *parts).items()}


def test_a_part_that_is_not_measured_again_keeps_its_stamp(tmp_path: Path, clock: dict[str, str]) -> None:
    path = tmp_path / "some.json"
    for part in ("load", "speed/a", "speed/b"):
        keep(path, part, {"seconds": 1}, {"protocol": 1}, load_before=0.5)
    turn(clock)
    keep(path, "speed/a", {"seconds": 2})
    record = json.loads(path.read_text())
    assert {name: record[name] for name in ("protocol", "load", "speed")} == {
        "protocol": 1,
        "load": {"seconds": 1},
        "speed": {"a": {"seconds": 2}, "b": {"seconds": 1}},
    }
    assert days(path) == {"load": "2026-11-20", "speed/b": "2026-11-20", "speed/a": "2026-11-22"}
    assert days(path, "speed") == {"speed/b": "2026-11-20", "speed/a": "2026-11-22"}
    found = stamps(record)
    assert (found["load"]["commit"], found["load"]["load_before"], found["speed/a"]["commit"]) == ("aaaaaaa", 0.5, "bbbbbbb")
    assert "load_before" not in found["speed/a"]
    assert found["speed/a"]["versions"] == {"torch": "2.0"}
    for part in ("load", "speed/b"):  # nothing is left of the first stamp
        keep(path, part, {})
    assert [stamp["commit"] for stamp in json.loads(path.read_text())["measured"]] == ["bbbbbbb"]


def test_another_machine_has_a_stamp_of_its_own(tmp_path: Path, clock: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.json"
    keep(path, "a", 1)
    monkeypatch.setattr(records, "this_machine", lambda device: {**HERE, **clock, "gpu": device})
    keep(path, "b", 2, device="cuda")
    assert {part: stamp["gpu"] for part, stamp in stamps(json.loads(path.read_text())).items()} == {"a": None, "b": "cuda"}


def test_a_whole_record_has_one_stamp() -> None:
    assert stamps({"machine": HERE}) == stamps({"machine": HERE}, "load") == {"": HERE}
    assert stamps({}) == {}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_record_says_when_and_on_what(path: Path) -> None:
    record = json.loads(path.read_text())
    found = stamps(record)
    assert found
    assert ("machine" in record) != ("measured" in record)
    for part, stamp in found.items():
        group, _, name = part.partition("/")
        assert not part or name in record[group] or (not name and group in record)
        assert {"processor", "versions", "commit", "date"} <= stamp.keys()


def test_when_it_was_measured_in_words() -> None:
    first, second = ({**HERE, "commit": "aaaaaaa", "date": f"2026-11-2{day}T12:00:00+00:00"} for day in (0, 2))
    on = "Measured on AMD EPYC, 2 cores, Python 3.11.7, PyTorch 2.0"
    assert layout.measured({}) == ""
    assert layout.measured({"": first}) == layout.measured({"a": first, "b": first}) == f"{on} (2026-11-20, commit aaaaaaa)."
    both = "`b` (2026-11-22, commit aaaaaaa); `a` (2026-11-20, commit aaaaaaa)"
    assert layout.measured({"a": first, "b": second}) == f"{on}: {both}."
    many = {str(number): first for number in range(1 + layout.NAMED)}
    assert f"{len(many)} others (2026-11-20," in layout.measured({**many, "b": second})
    browser = {**second, "versions": {"node": "20.20.2"}, "commit": None}
    assert layout.measured({"a": first, "b": browser}) == (
        "Measured on AMD EPYC, Node 20.20.2: `b` (2026-11-22, commit unknown). "
        "On AMD EPYC, 2 cores, Python 3.11.7, PyTorch 2.0: `a` (2026-11-20, commit aaaaaaa)."
    )


# ------------------------------------------------------------------------------------------------------------- the scripts


def speeds(batch_size: int, precision: str) -> dict[str, Any]:
    ratio = {"value": 2.0, "low": 1.9, "high": 2.1}
    engine = {"images_per_second": 100.0, "over_eager": ratio, "max_rel_err": 1e-6}
    return {"batch_size": batch_size, "precision": precision, "engines": {"native": engine, "ncnn": engine}}


def test_engines_are_measured_part_by_part(tmp_path: Path, clock: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the page says of each part when, and that our engine is faster since, whatever was measured between."""
    path, loaded = tmp_path / "engines.json", {"seconds": 1.0, "seconds_with_empty_caches": 11.7, "bytes": 1 << 20}
    formats = {"onnx": {"predictions": 10, "same": 10, "clear": 9, "differ_where_clear": 0, "error": {"relative": 1e-7}}}
    predicted = {"model": {"name": "repvgg_mini"}, "clear": 0.1, "formats": formats}
    monkeypatch.setattr(measure_engines, "OUT", path)
    monkeypatch.setattr(measure_engines, "speed", lambda precisions: (speeds(n, p) for n in (1, 32) for p in precisions))
    monkeypatch.setattr(measure_engines, "load_and_memory", lambda: {"native": loaded})
    monkeypatch.setattr(measure_engines, "predictions", lambda file, data: predicted)
    monkeypatch.setattr("measure_engines.torch.set_num_threads", lambda count: None)
    measure_engines.main(["speed", "load", "bf16"])  # bf16 first
    turn(clock)
    measure_engines.main(["speed", "fp32"])
    measure_engines.main(["predictions", "a file", "some data"])
    later, earlier = "2026-11-22", "2026-11-20"
    assert days(path, "load", "predictions") == {"load": earlier, "predictions": later}
    assert days(path, "speed") == {
        f"speed/batch {n}, {precision}": day for precision, day in (("bf16", earlier), ("fp32", later)) for n in (1, 32)
    }
    record = json.loads(path.read_text())
    assert record["protocol"] == json.loads(json.dumps(measure_engines.PROTOCOL))
    native = {"start": {"native cold, batch 1": {"seconds": 1.01}}}
    on = {"measured": [{**HERE, "commit": "ccccccc", "parts": {"start": {"date": "2026-11-21T00:00:00+00:00"}}}]}
    text = deploy_table.engines(record, native | on)
    assert "| engine | batch 1, fp32 | batch 1, bf16 | batch 32, fp32 | batch 32, bf16 |" in text
    assert "`native` was measured again [since]" in text
    assert "`load` (2026-11-20, commit aaaaaaa)" in text.replace("`speed/batch 1, bf16`, `speed/batch 32, bf16`, ", "")
    on["measured"][0]["parts"] = {"start": {"date": "2026-11-19T00:00:00+00:00"}}
    assert "was measured again" not in deploy_table.engines(record, native | on)
    sized = deploy_table.sizing(record, None, None)
    assert "`batch 32, fp32` (2026-11-22, commit bbbbbbb); `batch 32, bf16` (2026-11-20, commit aaaaaaa)" in sized
    assert "batch 1," not in sized


def test_a_remedy_leaves_the_stamps_of_others(tmp_path: Path, clock: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, top1 = tmp_path / "int8.json", SimpleNamespace(top1=0.9, images=10)
    report = SimpleNamespace(
        before=top1, after=top1, kept=[], layers=[SimpleNamespace(snr=1.0)], settings=Quantization(), path=path
    )
    monkeypatch.setattr(measure_int8, "OUT", path)
    for name in ("open_source", "load"):
        monkeypatch.setattr(measure_int8, name, lambda what: MagicMock())
    monkeypatch.setattr(measure_int8, "replace", lambda source, train: source)
    monkeypatch.setattr(measure_int8, "manifest_of", lambda model: SimpleNamespace(arch=None))
    monkeypatch.setattr(measure_int8, "quantize", lambda *words, **more: report)
    monkeypatch.setattr(measure_int8, "planned", lambda file: ["F4 int8", "direct int16", ""])
    measure_int8.accuracy("a file", "some data", ["plain"])
    turn(clock)
    measure_int8.accuracy("a file", "some data", ["equalised"])
    assert days(path) == {
        "accuracy/plain, openvino": "2026-11-20",
        "accuracy/plain, onnx": "2026-11-20",
        "accuracy/plain, native": "2026-11-20",
        "accuracy/equalised, openvino": "2026-11-22",
    }
    assert json.loads(path.read_text())["accuracy"]["plain, native"]["plan"] == ["F4 int8", "direct int16", ""]


def test_networks_are_measured_one_by_one(
    tmp_path: Path, clock: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "compatibility.json", tmp_path / "compatibility.md"
    network = {"before": [2, 2], "after": [2, 0], "error": 1e-15, "own": 1e-15, "left": {}}
    monkeypatch.setattr(measure_compatibility, "FILE", path)
    monkeypatch.setattr(measure_compatibility, "PAGE", page)
    monkeypatch.setattr(measure_compatibility, "run", lambda case, environments: network)
    for names in (["timm:resnet18", "timm:repvgg_a0"], ["timm:resnet18", "smp:tu-repvgg_a0"]):  # the first is there already
        monkeypatch.setattr("sys.argv", ["measure_compatibility.py", "--only", *names])
        measure_compatibility.main()
        turn(clock)
    earlier = "`networks/timm:resnet18`, `networks/timm:repvgg_a0` (2026-11-20, commit aaaaaaa)"
    assert f"`networks/smp:tu-repvgg_a0` (2026-11-22, commit bbbbbbb); {earlier}." in page.read_text()


def test_the_page_counts_the_files_for_the_browser() -> None:
    folder = RESULTS.parent / "engine" / "repvgg_engine" / "browser"
    record = json.loads((RESULTS / "wasm.json").read_text())
    assert record["bytes"].keys() == {path.name for path in folder.glob("*.wasm")}
    record["bytes"] = {"repvgg_engine.relaxed.wasm": 191964, "repvgg_engine.wasm": 195088}
    assert "The engine is 2 files of 192 and 195 kB" in sections.wasm(record)


def test_speeds_have_three_digits_and_no_exponents() -> None:
    assert [layout.pace(speed) for speed in (7.804, 59.44, 99.96, 177.4, 1513.0, 345_533.0)] == [
        "7.8",
        "59.4",
        "100",
        "177",
        "1,510",
        "346,000",
    ]


def test_what_is_next_is_told_where_the_order_is_not_the_papers() -> None:
    record = json.loads((Path(sections.__file__).parent / "ablation.json").read_text())
    record["rank_correlation"]["spearman"] = 0.4
    assert "What would decide it is not known" in sections.ablation(record)
    record["rank_correlation"]["spearman"] = 0.9
    assert "What would decide it is not known" not in sections.ablation(record)


def test_parts_of_another_protocol_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    keep(path, "pairs/a", 1, {"protocol": {"rounds": 5}})
    keep(path, "pairs/b", 2, {"protocol": {"rounds": 5}})
    before = path.read_text()
    with pytest.raises(ValueError, match="pairs/a was measured under another protocol: measure all, or move the file away"):
        keep(path, "pairs/b", 3, {"protocol": {"rounds": 6}})
    assert path.read_text() == before


def test_records_of_other_code_say_so_until_they_are_measured_again() -> None:
    """Each of these words goes by itself: what is compared is the record and the code of today."""
    from repvgg.train.auto import FEW
    from repvgg.train.recipes import get_recipe

    run = {"arch": "pspnet_repvgg_micro", "command": "train --width 0.25", "per_class": {"a": 0.5, "b": 0.5}, "parameters": 1}
    assert "another than today's" in outdated.network(run)
    built = outdated._parameters("pspnet_repvgg_micro", 2, 0.25)
    assert built == sum(p.numel() for p in create_model("pspnet_repvgg_micro", num_classes=2, width=0.25, deploy=True).parameters())
    assert outdated.network({**run, "parameters": built}) == ""
    assert outdated.photos({"recipe": asdict(FEW)}) == ""
    assert "smooths labels by 0.2 instead of 0.1" in outdated.photos({"recipe": {**asdict(FEW), "label_smoothing": 0.1}})
    cifar = {"recipe": {**asdict(get_recipe("cifar")), "epochs": 14}, "command": "train --epochs 14", "machine": {"commit": "abc"}}
    assert outdated.recipe(cifar) == ""
    words = outdated.recipe({**cifar, "recipe": {"epochs": 14, "batch_size": 128}})
    assert words == "at commit abc, whose recipe was another (`optimizer` sgd, now muon; `batch_size` 128, now 256)"
    there, before = {"date": "2026-11-22T12:00"}, {"date": "2026-11-21T12:00"}
    cifar10 = {"measured": [{"parts": {"embedded": there}}]}
    assert outdated.embedded(before, cifar10) == "an earlier "
    assert outdated.embedded(there, cifar10) == outdated.embedded(before, None) == ""
    sizes, words = outdated.build({"bytes": {"repvgg_engine.wasm": 1}})
    assert words.endswith("an earlier build.")
    assert outdated.build({"bytes": {"repvgg_engine.wasm": sizes[0]}})[1] == ""


def test_speeds_are_stamped_when_they_were_timed() -> None:
    day, pair = "2026-11-20T01:02:03+00:00", {"date": "2026-11-21T01:02:03+00:00", "commit": "bbbbbbb"}
    table = {"machine": {**HERE, "date": "2026-11-22", "commit": "ccccccc"}, "data": {"speeds": [{"date": day}], "headlines": []}}
    assert [(s["date"], s["commit"]) for s in readme.timed(table).values()] == [(day, None)]
    table["data"]["headlines"] = [{"pair": pair}]  # type: ignore[index]
    assert [s["commit"] for s in readme.timed(table).values()] == [None, "bbbbbbb"]


def test_a_plan_in_the_record_is_counted() -> None:
    record = json.loads((RESULTS / "int8.json").read_text())
    record["accuracy"]["plain, native"]["plan"] = ["F4 int8", "direct int16", "", "F7 int16"]
    assert "| plain, native, as planned here: 2 of 3 layers in 16 bits |" in sections.int8(record)
    assert "without bias correction" in sections.int8(record)
    for accuracy in record["accuracy"].values():
        accuracy["constants_folded"] = True
    assert "without bias correction" not in sections.int8(record)
