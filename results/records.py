"""Records that are measured part by part: each part has the machine, the versions, the commit and the date of its own measuring.

`measured` in a record lists these stamps: one for each machine, versions and commit, with the parts that were measured so and
when. A part is named by its place in the record: "load", or "members/repvgg_b1". What is measured whole has one, `machine`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from repvgg.disk import write_text
from repvgg.measure.machine import this_machine

Record = dict[str, Any]
Stamp = dict[str, Any]  # what `this_machine` returns


def keep(path: Path, part: str, figures: Any, about: Record | None = None, device: str = "", **told: Any) -> None:
    """Write the figures of one part with what they were measured on; the other parts of the record stay as they are.

    about: what the record says of all parts. told: what else belongs to this part's stamp.
    """
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    others = [other for stamp in record.get("measured", []) for other in stamp["parts"] if other != part]
    for what, fact in json.loads(json.dumps(about or {})).items():
        if others and record.get(what, fact) != fact:
            raise ValueError(f"{path}: {others[0]} was measured under another {what}: measure all, or move the file away")
        record[what] = fact
    group, _, name = part.partition("/")
    record[group] = {**record.get(group, {}), name: figures} if name else figures
    here, measured = this_machine(device), record.pop("measured", [])
    at = {"date": here.pop("date"), **told}
    for stamp in measured:
        stamp["parts"].pop(part, None)
    same = next((stamp for stamp in measured if stamp == {**here, "parts": stamp["parts"]}), None)
    if same is None:
        measured.append(same := {**here, "parts": {}})
    same["parts"][part] = at
    record["measured"] = [stamp for stamp in measured if stamp["parts"]]
    text = json.dumps(record, indent=2) + "\n"
    write_text(path, text)


def say(line: str) -> None:
    """Tell whoever waits where the work stands; what is printed on standard output may be figures."""
    print(line, file=sys.stderr, flush=True)


def stamps(record: Record, *parts: str) -> dict[str, Stamp]:
    """Return the stamps of those parts, or groups of parts, by part; by default of all, and under "" that of a whole record."""
    if "machine" in record:
        return {"": record["machine"]}
    found = {part: {**stamp, **at} for stamp in record.get("measured", []) for part, at in stamp["parts"].items()}
    return {part: stamp for part, stamp in found.items() if not parts or {part, part.partition("/")[0]} & set(parts)}
