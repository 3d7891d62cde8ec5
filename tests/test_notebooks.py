"""The notebooks of docs/notebooks run from top to bottom, as a reader runs them."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_four_and_none_holds_results() -> None:
    """Results would be of another machine, and change at each run."""
    nbformat = pytest.importorskip("nbformat")
    assert [path.stem for path in NOTEBOOKS] == ["deploy", "fold", "paper", "train"]
    for path in NOTEBOOKS:
        book = nbformat.read(path, 4)
        nbformat.validate(book)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert len(cells) >= 3
        assert not any(cell.outputs or cell.execution_count for cell in cells)
        assert book.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, 4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(texts)
