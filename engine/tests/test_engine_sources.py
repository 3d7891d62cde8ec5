"""What the project's Python files must not do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["src", "engine/repvgg_engine", "results", "docs"])
def test_nothing_imports_mnn_tools(folder: str) -> None:
    """Importing it pip-installs a logging client and reports to its makers; see deploy/engines/mnn.py."""
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            found += [f"{path}: {name}" for name in names if name.startswith("MNN.tools")]
    assert not found
