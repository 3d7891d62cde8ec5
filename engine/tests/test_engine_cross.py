"""The engine built for systems that are not here, by zig's cross compilers. None of it is run."""

import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ENGINE = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ziglang") is None, reason="needs pip install ziglang"),
]


@pytest.fixture
def compiler(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A compiler for the test's target."""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ -target {request.param} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def sh(*words: str | Path) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("compiler", "system", "processor", "library", "magic"),
    [
        # The processor as CMake knows it may be the host's (with ARCHFLAGS on a Mac): the compiler says what is built. These magic
        # numbers: Mach-O, 64 bits, of ARM and of x86; ELF.
        ("aarch64-macos", "Darwin", "x86_64", "librepvgg_engine.dylib", b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),
        ("x86_64-macos", "Darwin", "arm64", "librepvgg_engine.dylib", b"\xcf\xfa\xed\xfe\x07\x00\x00\x01"),
        ("aarch64-linux-gnu", "Linux", "aarch64", "librepvgg_engine.so", b"\x7fELF\x02\x01"),
    ],
    indirect=["compiler"],
)
def test_the_library_builds(compiler: Path, tmp_path: Path, system: str, processor: str, library: str, magic: bytes) -> None:
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    cross = [f"-DCMAKE_SYSTEM_NAME={system}", f"-DCMAKE_SYSTEM_PROCESSOR={processor}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    cross += ["-DCMAKE_INSTALL_NAME_TOOL=true", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    sh("cmake", "-S", ENGINE, "-B", tmp_path / "build", *cross)
    sh("cmake", "--build", tmp_path / "build", "--parallel", "2")
    assert (tmp_path / "build" / library).read_bytes().startswith(magic)


def test_two_architectures_at_once(tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    words = ["cmake", "-S", str(ENGINE), "-B", str(tmp_path), "-DCMAKE_OSX_ARCHITECTURES=arm64;x86_64"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "a build is of one architecture, not of arm64;x86_64" in done.stderr
