"""Write results/paper/index.html anew from the records beside it. Nothing is timed.

python results/paper_page.py figure1    # after `repvgg paper figure1 --out results/paper`: takes in the new drawings of these parts
python results/paper_page.py            # after others
python results/paper_page.py --check    # exit code 1 if it is out of date
"""

import json
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from outdated import indirect

from repvgg.paper.report import PARTS, as_page
from repvgg.paper.result import PaperSettings, Result, Table
from repvgg.web.page import drawing

FOLDER = Path(__file__).parent / "paper"
SECTION = re.compile(r'<section id="[^"]*">\n<h2>(.*?)</h2>\n(.*?)\n</section>', re.DOTALL)
FIGURE = re.compile(r"<figure>.*?</figure>", re.DOTALL)


def written(folder: Path = FOLDER, redrawn: Sequence[str] = ()) -> str:
    """Return the page of a folder's records, with the figures of the page that is there, but for the parts that are drawn anew."""
    sections = dict(SECTION.findall((folder / "index.html").read_text()))
    records = {part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()}
    before = {part: sections.get(escape(record["title"]), "") for part, record in records.items()}
    return as_page(
        {part: _result(record, before[part]) for part, record in records.items()},
        PaperSettings(out=folder),
        {part: record["machine"] for part, record in records.items()},
        {p: [drawing((folder / f"{p}.svg").read_bytes())] if p in redrawn else FIGURE.findall(old) for p, old in before.items()},
    )


def _result(record: dict[str, Any], before: str) -> Result:
    """Return a part as it was measured, without its figures. before: its section of the page, which says what tables are folded."""
    tables = [Table(t["title"], t["header"], t["rows"], f"<summary>{escape(t['title'])}<" in before) for t in record["tables"]]
    why = f"{record['why']} {indirect(record)}".strip()
    return Result(record["title"], tables, why, record["data"], how=record["how"])


def main(check: bool, redrawn: Sequence[str] = ()) -> int:
    """Rewrite the page, or return 1 if it is out of date."""
    page, text = FOLDER / "index.html", written(FOLDER, redrawn)
    stale = page.read_text() != text
    if not check:
        page.write_text(text)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:], [part for part in sys.argv[1:] if part != "--check"]))
