"""Lay the pages out for the documentation site: python docs/pages.py [FOLDER], then mkdocs build (make docs does both).

README becomes the first page; docs/ and results/ keep their places beside it, so that every link works here as it does in the
repository. The API's page lists the names of the package, from its own table of them.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from repvgg import _HOME

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "pages"
LINKED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", "results", "src/repvgg/demo.py", "engine/examples")


def main(folder: Path = FOLDER) -> None:
    """Copy what is under version control and linked, and write the API's page."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", *LINKED], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603, S607
    for name in listed.stdout.splitlines():
        target = folder / ("index.md" if name == "README.md" else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    entries = "\n\n".join(f"::: repvgg.{_HOME[name]}.{name}" for name in sorted(_HOME, key=str.lower))
    (folder / "docs" / "api.md").write_text(
        f"# Python\n\nEvery name of `repvgg`: what it takes, returns and raises.\n\n{entries}\n"
    )


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
