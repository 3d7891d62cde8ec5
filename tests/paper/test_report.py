"""`repvgg paper`: what it prints and what it leaves behind."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from repvgg.cli import main
from repvgg.disk import FileError
from repvgg.paper import report
from repvgg.paper.report import PARTS, as_page, paper
from repvgg.paper.result import NothingChosenError, PaperSettings, Result, Table


def result(part: str) -> Result:
    from repvgg.web.drawing import canvas

    figures = {part: canvas(40, 30)[0]} if part.startswith("figure") else {}
    tables = [] if figures else [Table(f"rows of {part}", ("name", "number"), [("<b>", 1.5), (None, 2)])]
    return Result(f"The {part}", tables, f"Why {part} & ours differ.", {"found": part}, figures)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts are asked for, and are not run."""
    asked: list[str] = []

    class Module:
        def __init__(self, name: str) -> None:
            self.part = name.rpartition(".")[2]

        def run(self, settings: PaperSettings) -> Result:
            asked.append(self.part)
            if self.part == "table5":
                raise NothingChosenError("nothing of it")
            return result(self.part)

    monkeypatch.setattr(report, "import_module", Module)
    return asked


def test_every_part_has_its_file_and_only_those() -> None:
    files = {path.stem for path in Path(report.__file__).parent.glob("*.py")}
    assert set(PARTS) == files - {
        "__init__",
        "ablation",
        "agreement",
        "drawing",
        "findings",
        "grid",
        "numbers",
        "report",
        "result",
        "speeds",
    }


def test_one_part(made_up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str] = []
    paper("table1", PaperSettings(out=tmp_path / "new", log=words.append))
    out = capsys.readouterr().out
    assert out.splitlines()[1] == "The table1"
    assert "rows of table1" in out
    assert "Why table1 & ours differ." in out
    record = json.loads((tmp_path / "new" / "table1.json").read_text())
    assert record["title"] == "The table1"
    assert record["tables"] == [{"title": "rows of table1", "header": ["name", "number"], "rows": [["<b>", "1.5"], ["", "2"]]}]
    assert (record["quick"], record["data"]) == (False, {"found": "table1"})
    assert {"processor", "versions", "commit"} <= record["machine"].keys()
    assert words == [f"written: {tmp_path / 'new' / 'table1.json'}"]


def test_figures_are_written_as_png_and_svg(made_up: list[str], tmp_path: Path) -> None:
    paper("figure3", PaperSettings(out=tmp_path, log=lambda line: None))
    with Image.open(tmp_path / "figure3.png") as image:
        assert image.size == (80, 60)
    assert (tmp_path / "figure3.svg").read_text().startswith("<?xml")


def test_json(made_up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper("table1", PaperSettings(out=tmp_path, log=lambda line: None), with_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "table1.json").read_text())


@pytest.mark.parametrize("quick", [True, False])
def test_all_and_its_page(quick: bool, made_up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str] = []
    paper("all", PaperSettings(out=tmp_path, quick=quick, log=words.append))
    assert made_up == list(PARTS)
    assert "table5 left out: nothing of it" in words
    html = (tmp_path / "index.html").read_text()
    for part in PARTS:
        assert (f"The {part}" in html) == (f"Why {part} &amp; ours differ." in html) == (part != "table5")
    assert html.count("<svg") == 4
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", html)
    marks = len([part for part in PARTS if part != "table5"]) + len([part for part in PARTS if not part.startswith("figure")]) - 1
    assert html.count("(quick)</h") == (marks if quick else 0)
    assert ("quick look" in html) == quick
    printed = capsys.readouterr().out
    assert ("(quick)" in printed) == quick
    assert json.loads((tmp_path / "table1.json").read_text())["quick"] == quick


def test_a_page_of_something_else_stays(made_up: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        paper("all", PaperSettings(out=tmp_path, log=str))
    (tmp_path / "index.html").write_bytes(b"precious \xff")
    with pytest.raises(FileError, match=r"index\.html: is the page of something else"):
        paper("all", PaperSettings(out=tmp_path, log=str))
    assert (tmp_path / "index.html").read_bytes() == b"precious \xff"


def test_unknown_part_and_model(made_up: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the paper has no 'tabel4' here: did you mean table4"):
        paper("tabel4", PaperSettings(out=tmp_path))
    with pytest.raises(ValueError, match="no model 'resnet19': did you mean resnet1"):
        paper("table4", PaperSettings(out=tmp_path, models=("resnet19",)))
    with pytest.raises(ValueError, match="no engine 'tensorflow'"):
        paper("table4", PaperSettings(out=tmp_path, engine="tensorflow"))
    with pytest.raises(ValueError, match="the engine eager has no tf32 on cpu: it has fp32, bf16, fp16"):
        paper("table4", PaperSettings(out=tmp_path, precision="tf32"))
    assert not made_up


@pytest.mark.parametrize("name", ["batch_size", "rounds", "threads"])
def test_sizes_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: it is at least 1"):
        PaperSettings(**{name: 0})  # type: ignore[arg-type]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["paper", "table3", "--out", str(tmp_path), "--quick", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["title"] == "Table 3: the family (quick)"
    assert record["data"]["equal"]
    with pytest.raises(SystemExit) as stop:
        main(["paper", "table4", "--out", str(tmp_path), "--models", "repvgg_a7"])
    assert stop.value.code == 2
    assert re.fullmatch(r"repvgg: no model 'repvgg_a7': did you mean [^\n]*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_all_quick_for_real(tmp_path: Path) -> None:
    models = "repvgg_a0,resnet18,repvgg_b2g4,pspnet_repvgg_micro_fast"
    words = ["--quick", "--models", models, "--data", "digits", "--rounds", "1", "--batch-size", "1", "--out", str(tmp_path)]
    main(["paper", "all", *words])
    html = (tmp_path / "index.html").read_text()
    assert html.count("(quick)</h2>") == len(PARTS)
    assert {f"{part}.json" for part in PARTS} <= {path.name for path in tmp_path.iterdir()}


def test_a_protocol_that_parts_share_is_told_once(tmp_path: Path) -> None:
    hows = {"table4": "By turns.", "table5": "By turns.", "figure2": "", "table2": "", "table8": "Otherwise."}
    results = {part: Result(f"{part}: of something", (), "", {}, how=how) for part, how in hows.items()}
    html = as_page(results, PaperSettings(out=tmp_path))
    assert html.count("By turns.") == html.count("Otherwise.") == 1
    assert html.count("Measured as for ") == html.count("<p>Measured as for table4.</p>") == 1
