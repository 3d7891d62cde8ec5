"""The C interface from a C program, on this processor and, where a cross compiler and qemu are at hand, on aarch64."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine

HERE = Path(__file__).parent
CHECK, SOURCE = HERE / "check.c", HERE.parent / "src"


def sh(*words: str | Path) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(compiler: str, folder: Path, *links: str | Path) -> Path:
    program = folder / "check"
    sh(compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", SOURCE, CHECK, *links, "-lm", "-o", program)
    return program


def test_a_c_program_links_what_is_installed(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = Path(repvgg_engine.__file__).parent / "librepvgg_engine.so"
    said = sh(built(compiler, tmp_path, library, f"-Wl,-rpath,{library.parent}"))
    for name in (*repvgg_engine.instruction_sets(), "F2", "F4", "F7", "direct"):
        assert name == "bf16" or f"{name} " in said


@pytest.mark.slow
def test_aarch64(tmp_path: Path) -> None:
    """Cross-compiled with NEON, run by qemu."""
    triple = "aarch64-linux-gnu"
    if platform.machine() != "x86_64" or not all(map(shutil.which, (f"{triple}-g++", "qemu-aarch64", "cmake"))):
        pytest.skip("needs g++-aarch64-linux-gnu, qemu-user and cmake")
    cross = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={triple}-g++"]
    sh("cmake", "-S", HERE.parent, "-B", tmp_path / "build", *cross)
    sh("cmake", "--build", tmp_path / "build")
    library = tmp_path / "build/librepvgg_engine.so"
    program = built(f"{triple}-gcc", tmp_path, library, f"-Wl,-rpath,{library.parent}")
    said = sh("qemu-aarch64", "-L", f"/usr/{triple}", program)
    assert "portable" in said
    assert "F7" in said
