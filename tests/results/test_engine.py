"""results/measure_engine.py: which parts are measured, on which images; and what rivals.py and targets.py make of the record."""

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import layout
import measure_engine
import rivals
import sections
import targets
from measure_engine import MEMBERS, MICRO, PARTS, asked, compare
from records import stamps


def test_another_instruction_set_overwrites_no_part() -> None:
    assert asked(["a0"], "avx2") == asked(["avx2"], "avx2") == asked(["a0", "avx2"], "avx2") == ["avx2"]
    assert asked(["a0", "repvgg_b1"], "") == ["a0", "repvgg_b1"]
    assert asked([], "") == [*PARTS, *MEMBERS]
    for words, isa in ((["a2"], "avx2"), (["a0", "start"], "avx2"), ([], "avx2"), (["a0"], "portable"), (["repvgg_b1"], "avx2")):
        with pytest.raises(SystemExit, match=f"with REPVGG_ENGINE_ISA={isa} only a0 with avx2"):
            asked(words, isa)
    with pytest.raises(SystemExit, match="no part 'a9': a0, a2, "):
        asked(["a9"], "")


def test_runs_of_any_batch_are_judged_on_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the model's file was there before or not."""
    monkeypatch.setattr(measure_engine, "TURN", 0)
    words = ("fp32 exact",)
    errors = [compare(MICRO, tmp_path, n, words, (), rounds=1)["native fp32 exact"]["rms_error"] for n in (64, 1, 8)]
    assert errors[0] == errors[1] == errors[2] > 0


def test_the_first_run_of_a_series_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds neither a plan nor its files in memory."""
    seen: dict[tuple[str, int, bool], int] = {}

    def first(name: str, file: Path, batch_size: int, folder: Path, cold: bool) -> tuple[float, int]:
        key = (name + file.name, batch_size, cold)
        seen[key] = seen.get(key, 0) + 1
        return (100.0, 1 << 30) if seen[key] == 1 else (1.0, 1 << 10)

    monkeypatch.setattr(measure_engine, "first", first)
    for name in ("model_file", "deploy_form"):
        monkeypatch.setattr(measure_engine, name, lambda *words: Path(words[0]))
    monkeypatch.setattr(measure_engine, "to_onnx", lambda *words: b"")
    found = measure_engine.start(tmp_path)
    wanted = {"n": measure_engine.REPEATS, "seconds": 1.0, "spread": [1.0, 1.0], "peak_kib": 1 << 10}
    assert all(f == wanted for f in found.values())
    assert set(seen.values()) == {1 + measure_engine.REPEATS}


def test_each_part_has_a_stamp_and_the_load_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "engine.json"
    run: dict[str, Any] = {"batch 1": {}}
    monkeypatch.setattr(measure_engine, "OUT", out)
    monkeypatch.setattr(measure_engine, "PARTS", {"a0": lambda folder: run, "a2": lambda folder: run})
    monkeypatch.setattr(measure_engine, "member", lambda word, folder: run)
    monkeypatch.setattr("measure_engine.torch.set_num_threads", lambda count: None)
    for words in (["a2", "repvgg_b0"], ["a0", "repvgg_b1"]):
        monkeypatch.setattr("sys.argv", ["measure_engine.py", *words])
        measure_engine.main()
    record = json.loads(out.read_text())
    assert record["a0"] == record["a2"] == run
    assert record["members"] == {"repvgg_b0": run, "repvgg_b1": run}
    found = stamps(record)
    assert set(found) == {"a0", "a2", "members/repvgg_b0", "members/repvgg_b1"}
    assert all({"commit", "date", "versions", "load_before"} <= stamp.keys() for stamp in found.values())


def test_a_machine_in_words() -> None:
    """With what tells processors of one brand apart; older records lack it."""
    old = {"processor": "AMD EPYC", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.0"}}
    assert layout.machine(old) == "AMD EPYC, 2 cores, Python 3.11.7, PyTorch 2.0"
    kind = "vendor_id AuthenticAMD, cpu family 25, model 1, stepping 1, 32K, 512K"
    new = {**old, "kind": kind, "instruction_sets": ["avx2", "portable"]}
    assert layout.machine(new).startswith("AMD EPYC (family 25, model 1, avx2, portable), 2 cores")


def run(**speeds: tuple[float, float]) -> dict[str, Any]:
    """Of one round. speeds: of each engine, and its error; "_" for a space."""
    return {
        name.replace("_", " "): {"images_per_second": speed, "by_round": [speed], "rms_error": error}
        for name, (speed, error) in speeds.items()
    }


def test_targets_that_are_kept_and_missed() -> None:
    ours = run(native_fp32_high=(90, 1), native_int8_high=(130, 0.5), native_int16_high=(110, 0.1))
    a0 = {**ours, **run(openvino=(40, 1), mnn=(50, 1), openvino_int8=(100, 1))}
    rows = [line.split(" | ") for line in targets.targets({"a0": {"batch 32": a0, "batch 1": a0}}, {}, {}).splitlines()[2:]]

    def row(*words: str) -> list[str]:
        (found,) = (row[1:] for row in rows if all(word in row[0] for word in words) and "AVX2" not in row[0])
        return [cell.removesuffix(" |") for cell in found]

    assert row("INT8", "32 at a time") == [
        "1.15",
        "1.10 (1.10 to 1.10), int16 high",
        "**missed**",
    ]  # int8 has half of its error, not a tenth
    assert row("INT8", "one image", "at most its error") == ["1.00", "1.30 (1.30 to 1.30), int8 high", "kept"]
    assert row("fp32 high", "32 at a time") == ["2.00", "1.80 (1.80 to 1.80), MNN", "**missed**"]
    assert row("bf16") == ["1.55", "", "not measured"]
    assert row("clear predictions") == ["0", "", "not measured"]


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_has_a_spread() -> None:
    """Not the ratio of the medians, which are of different rounds."""
    ours, theirs = {"by_round": [100.0, 200.0, 300.0]}, {"by_round": [100.0, 50.0, 200.0]}
    assert rivals.over(ours, theirs) == "1.50 (1.00 to 4.00)"


def test_targets_of_the_other_records() -> None:
    start = {"native cold, batch 1": {"seconds": 1.0}, "native cold, repvgg_b3, batch 1": {"seconds": 3.5}}
    start |= {"native, batch 32": {"seconds": 1.0, "peak_kib": 150 << 10}}
    engines = {"int16 high": {"differ_where_clear": 0}, "int8 high": {"differ_where_clear": 2}}
    wasm = {"target": 2.3, "ratio": {"median": 2.4}, "ratio_without_relaxed_simd": {"median": 2.1}}
    text = targets.targets({"start": start}, {"engines": engines}, wasm)
    assert "| 3 | 3.50 (repvgg_b3) | **missed** |" in text
    assert "with a plan | 200 | 150 | kept |" in text
    assert "without | 200 |  | not measured |" in text
    assert "change | 0 | 2 | **missed** |" in text
    assert "with relaxed SIMD | 2.30 | 2.40 | kept |" in text
    assert "| 2.30 | 2.10 | **missed** |" in text


def test_the_wasm_script_says_what_it_wants() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    script = Path(measure_engine.__file__).with_name("measure_wasm.mjs")
    for words in ([], ["site"], ["site", "runtime", "none"]):
        done = subprocess.run([node, script, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: node results/measure_wasm.mjs SITE RUNTIME")
        assert done.stderr.count("\n") == 1


ENGINE_FOR_BROWSERS = """
export const ENGINE = 'repvgg_engine.relaxed.wasm';
export const load = async () => ({channels: 1, height: 2, width: 2, run: () => [0, 2]});
"""
RUNTIME = """
exports.env = {wasm: {}};
exports.Tensor = class {};
exports.InferenceSession = {create: async () => ({inputNames: ['x'], run: async () => ({logits: {data: [0, 2]}})})};
"""


def test_the_wasm_script_says_when_at_which_commit_and_on_what(tmp_path: Path) -> None:
    """With stand-ins for both engines."""
    node, git = shutil.which("node"), shutil.which("git")
    if node is None or git is None:
        pytest.skip("no node, or no git")
    script = shutil.copy(Path(measure_engine.__file__).with_name("measure_wasm.mjs"), tmp_path)
    sizes = {"repvgg_engine.relaxed.wasm": 2000, "repvgg_engine.wasm": 3000}
    files = {"repvgg_engine.mjs": ENGINE_FOR_BROWSERS, "model.safetensors": "", "plan.json": "", "a0.onnx": ""}
    site, package = tmp_path / "site", tmp_path / "runtime" / "node_modules" / "onnxruntime-web"
    for folder, texts in (
        (site, {**files, **{name: "." * size for name, size in sizes.items()}}),
        (package, {"package.json": '{"version": "1.30.0", "main": "main.js"}', "main.js": RUNTIME}),
    ):
        folder.mkdir(parents=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    at = [git, "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "measure_wasm.mjs"], ["commit", "-qm", "a"]):
        subprocess.run([*at, *words], check=True)
    subprocess.run([node, script, site, tmp_path / "runtime", "1"], check=True, capture_output=True)
    record = json.loads((tmp_path / "wasm.json").read_text())
    head = subprocess.run([*at, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert record["machine"]["commit"] == head
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(record["machine"]["date"]) < timedelta(minutes=1)
    assert record["machine"]["versions"].keys() == {"node", "onnxruntime-web"}
    assert record["bytes"] == sizes
    assert "an earlier build" in sections.wasm(record)  # of other files than those in the tree
    assert f"commit {head})" in layout.measured(stamps(record))
