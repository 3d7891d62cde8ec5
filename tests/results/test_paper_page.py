"""results/paper/index.html shows what the records beside it say."""

import json
import re
from html import escape

import outdated
import paper_page


def test_the_page_is_that_of_the_records() -> None:
    assert paper_page.main(check=True) == 0, "run python results/paper_page.py"


def test_every_row_of_every_record_is_on_the_page() -> None:
    html = (paper_page.FOLDER / "index.html").read_text()
    rows = {tuple(re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)) for row in re.findall(r"<tr>(.*?)</tr>", html)}
    for path in paper_page.FOLDER.glob("*.json"):
        record = json.loads(path.read_text())
        for table in record["tables"] if isinstance(record, dict) else ():
            for row in table["rows"]:
                assert tuple(map(escape, row)) in rows, f"{path.name}: {row}"


def test_its_figures_stay() -> None:
    html = (paper_page.FOLDER / "index.html").read_text()
    assert html.count("<figure>") == paper_page.written().count("<figure>") == 10


def test_ratios_through_a_third_network_are_told_of_until_the_two_took_turns() -> None:
    record = json.loads((paper_page.FOLDER / "table4.json").read_text())
    for headline in record["data"]["headlines"]:
        headline.pop("pair", None)
    assert "did not take turns" in outdated.indirect(record)
    for headline in record["data"]["headlines"]:
        headline["pair"] = {}
    assert outdated.indirect(record) == outdated.indirect({"data": {}}) == ""
