"""The wheel alone and with each extra: environments that hold what pyproject.toml asks for, and nothing else.

What is asked for is linked from this environment instead of being downloaded, so that what nobody declared is missing.
"""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_path("purelib"))
# What each extra is for, as a user would try it; the first trains a model that the others take. "!" before what must be refused.
ROADS = {
    "": [
        "train --arch repvgg_micro --width 0.25 --data photos --image-size 32 --epochs 1 --out run",
        "predict run photos/dark/0.png --json",
        "convert run/best.safetensors deploy.safetensors",
        "predict deploy.safetensors photos/dark/0.png",
        "export deploy.safetensors --to pt2 --out exported",
        "eval run --data photos",
        "info repvgg_a0",
        "! export deploy.safetensors --to onnx --out exported",
    ],
    "demo": ["report run", "paper figure3 --quick --out paper"],
    "train": ["train --arch repvgg_micro --width 0.25 --data photos --image-size 32 --epochs 1 --out run2", "report run2"],
    "deploy": ["export deploy.safetensors --to onnx openvino ncnn mnn pt2 --out exported", "predict exported/deploy.onnx photos"],
    "bench": ["bench repvgg_micro resnet18 --input-size 32 --batch-size 1 --rounds 2 --batches 1", "paper table3 --out paper"],
    "scale": ["predict deploy.safetensors --data photos --out parts"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no wheel can be built here: {done.stderr[-300:]}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of two classes."""
    folder = tmp_path_factory.mktemp("desk")
    for name, level in (("dark", 10), ("light", 200)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 40), (level + i, level, level)).save(folder / "photos" / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("extra", ROADS)
def test_the_wheel_with_an_extra_alone(extra: str, wheel: Path, desk: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    try:
        for name in _asked_for(next(site.glob("repvgg-*.dist-info")), extra):
            _link(name, site)
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"not everything of [{extra}] is here: {error}")
    for line in ROADS[extra]:
        words = line.removeprefix("! ").split()
        done = _repvgg(words, site, desk)
        assert done.returncode == (2 if line.startswith("!") else 0), f"[{extra}] {line}\n{done.stderr[-1500:]}"


def _repvgg(words: list[str], site: Path, desk: Path) -> "subprocess.CompletedProcess[str]":
    """Run the command in a Python that sees its own library and `site` alone."""
    code = f"import sys; sys.path.append({str(site)!r}); from repvgg.cli import main; main()"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", code, *words]
    return subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=600)


def _asked_for(info: Path, extra: str) -> list[str]:
    """Return what a distribution, its extra, and all that these ask for are called."""
    requirements = pytest.importorskip("packaging.requirements")
    found: dict[tuple[str, str], None] = {}
    left: list[tuple[metadata.Distribution, str]] = [(metadata.Distribution.at(info), extra)]
    while left:
        distribution, own = left.pop()
        for line in distribution.requires or ():
            asked = requirements.Requirement(line)
            if asked.marker and not asked.marker.evaluate({"extra": own}):
                continue
            for key in ((asked.name, each) for each in ("", *asked.extras)):
                if key not in found:
                    found[key] = None
                    itself = re.sub(r"[-_.]+", "-", asked.name).lower() == "repvgg"
                    left.append((metadata.Distribution.at(info) if itself else metadata.distribution(asked.name), key[1]))
    return [name for name in dict.fromkeys(name for name, _ in found) if name != "repvgg"]


def _link(name: str, site: Path) -> None:
    """Link what a distribution has installed; of folders that several share, what is below."""
    for file in metadata.distribution(name).files or ():
        parts = file.parts
        if parts[0] in ("..", "__pycache__"):
            continue
        depth = 1 if len(parts) == 1 or parts[0].endswith(".dist-info") or (SITE / parts[0] / "__init__.py").exists() else 2
        source, target = SITE.joinpath(*parts[:depth]), site.joinpath(*parts[:depth])
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
