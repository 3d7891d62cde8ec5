"""What the core alone can do: a process in which nothing but the dependencies of pyproject.toml can be imported."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = {re.match(r"[\w-]+", word)[0] for words in PROJECT["optional-dependencies"].values() for word in words} - {"repvgg"}  # type: ignore[index]
MODULES = {"scikit-learn": "sklearn", "clang-format": "clang_format", "pytest-xdist": "xdist", "moto": "moto"}

BLOCKED = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in {names!r} else found(name, package)
"""


@pytest.mark.slow
def test_the_core_trains_predicts_and_exports(tmp_path: Path) -> None:
    """An engine that is not here is named with the line that installs it."""
    for name, level in (("dark", 10), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 40), (level + i, level, level)).save(tmp_path / "photos" / name / f"{i}.png")
    names = {MODULES.get(name, name.replace("-", "_")) for name in EXTRAS} | {"repvgg_engine"}
    assert {"matplotlib", "onnx", "datasets", "pyarrow", "timm", "ray"} <= names
    code = BLOCKED.format(names=names) + (
        "import repvgg\n"
        "run = repvgg.train('repvgg_micro', 'photos', 'run', epochs=2, width=0.25, image_size=32)\n"
        "print(repvgg.evaluate('run', 'photos'))\n"
        "print(repvgg.predict('run', 'photos/dark/0.png'))\n"
        "print(repvgg.export('run', 'pt2', 'exported')[0])\n"
        "from repvgg import cli\n"
        "cli.main(['predict', 'run', 'photos'])\n"
        "try: cli.main(['export', 'run', '--to', 'onnx', '--out', 'exported'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "new weights" in done.stdout
    assert "the engine onnxruntime needs onnx, onnxscript, onnxruntime: pip install onnx onnxscript onnxruntime" in done.stderr
    assert (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("compiler", "why"), [("sh", "its build failed"), ("no-such-compiler", "no C++ compiler")])
def test_setup_goes_on_without_the_engine(tmp_path: Path, compiler: str, why: str) -> None:
    """It says in a line what is missing, and tries again the next time."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "pip").chmod(0o755)
    for name in ("pip", "demo", "all"):
        (tmp_path / f"{name}.stamp").touch()
    words = ["make", "-s", f"VENV={tmp_path}", "setup"]
    environment = {**os.environ, "CXX": compiler}
    done = subprocess.run(words, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=True)
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "engine.stamp").exists()
