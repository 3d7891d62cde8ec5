"""Docstrings can be read alone: in a tooltip nobody sees the name above them or the line below."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "src" / "repvgg").rglob("*.py"), *(ROOT / "results").glob("*.py")])
# With these a first line leans on something that the reader does not see.
LEANING = {
    "Of",
    "That",
    "Those",
    "These",
    "What",
    "Whether",
    "Which",
    "Where",
    "When",
    "How",
    "Why",
    "As",
    "For",
    "From",
    "With",
    "None",
}
# With these, and the ones above, a function's first line has no verb in front: it says what there is, not what is done.
NO_VERB = LEANING | {"A", "An", "The", "One", "Each", "Every", "All", "Some", "Both", "By", "In", "On", "Over", "At", "To"}


@dataclass(frozen=True)
class Docstring:
    where: str
    first: str  # its first paragraph
    does: bool  # it is a public function's, which does something, and no property's

    @property
    def faults(self) -> list[str]:
        opening = self.first.split()[0].rstrip(",.;:")
        found = []
        if not (opening[0].isupper() or opening[0] in "`\"'(" or opening[0].isdigit()):
            found.append("begins with a small letter")
        if not self.first.endswith((".", ".)", ":", "!", "?")):
            found.append("does not end with a full stop")
        if opening in (NO_VERB if self.does else LEANING):
            found.append(f"begins with {opening!r}, not with {'a verb' if self.does else 'what it is'}")
        return found


def docstrings(path: Path) -> Iterator[Docstring]:
    tree = ast.parse(path.read_text())
    yield from _within(tree, path, public=True)


def _within(node: ast.AST, path: Path, public: bool) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield Docstring(where, " ".join(text.split("\n\n")[0].split()), function and public and not _is_property(node))
    for child in ast.iter_child_nodes(node):
        yield from _within(child, path, public and not str(getattr(child, "name", "")).startswith("_"))


def _is_property(node: ast.AST) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))


def test_docstrings_can_be_read_alone() -> None:
    faults = [f"{d.where}: {', '.join(d.faults)}: {d.first[:90]}" for path in FILES for d in docstrings(path) if d.faults]
    assert not faults, "\n" + "\n".join(faults)


def test_the_check_can_fail() -> None:
    good = Docstring("here", "Return the output height and width.", does=True)
    assert not good.faults
    for first in ("Of a map, that is left.", "return it.", "Return it", "The output height and width."):
        assert Docstring("here", first, does=True).faults, first
    assert not Docstring("here", "The output height and width.", does=False).faults
