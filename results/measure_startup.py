"""Time what a user waits for: help, a model's facts, one prediction, the first `--engine auto`; write results/startup.json.

python results/measure_startup.py          # on a machine that does nothing else; about three minutes

Every figure is seconds from a process's start to its end, with the files in the system's cache. `--engine auto` starts each time
with an empty cache of its own, in a terminal, and its live line is read back from there.
"""

import json
import os
import pty
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg import create_model, reparameterize, save
from repvgg.measure.machine import write_record

ROUNDS, FIRST_TIMES = 7, 3
CLI = str(Path(sys.executable).with_name("repvgg"))
LIMITS = {
    "repvgg --help": 0.4,
    "repvgg info FILE": 0.4,
    "a mistyped flag": 0.4,
    "repvgg predict, one photo": 1.0,
    "engine auto": 15.0,
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def seconds_of(command: list[str], code: int = 0) -> float:
    """Run a command that must end with this code."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    spent = time.perf_counter() - started
    if done.returncode != code:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr}")
    return spent


def in_a_terminal(command: list[str], cache: str) -> tuple[float, list[str]]:
    """Run a command in a terminal; return its seconds and the steps that its live line showed."""
    started, said = time.perf_counter(), b""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, {**os.environ, "XDG_CACHE_HOME": cache, "TERM": "xterm", "COLUMNS": "200"})  # noqa: S606
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # the last process that held it has ended
            break
        if not read:
            break
        said += read
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    spent = time.perf_counter() - started
    text = ESCAPES.sub("\n", said.decode(errors="replace"))
    if code:
        raise RuntimeError(f"{shlex.join(command)} ended with {code}: {text}")
    return spent, list(dict.fromkeys(re.findall(r"(?:building|timing) [\w, -]*\w", text)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, photo = str(Path(folder) / "a0.safetensors"), str(Path(folder) / "photo.jpg")
        net = create_model("repvgg_a0").eval()
        started = time.perf_counter()
        deploy = reparameterize(net)
        fold = time.perf_counter() - started
        save(deploy, model)
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(photo)
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import repvgg": [sys.executable, "-c", "import repvgg"],
            "import torch": [sys.executable, "-c", "import torch"],
            "repvgg --help": [CLI, "--help"],
            "repvgg info FILE": [CLI, "info", model],
            "a mistyped flag": [CLI, "predict", model, photo, "--tpo", "3"],
            "repvgg predict, one photo": [CLI, "predict", model, photo],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS + 1):  # the first warms the file cache
            for name, command in commands.items():
                seconds[name].append(seconds_of(command, code=2 if "mistyped" in name else 0))
        seconds = {name: s[1:] for name, s in seconds.items()}
        answer = subprocess.run([CLI, "predict", model, photo, "--json"], check=True, capture_output=True, text=True)
        engine = json.loads(answer.stdout.splitlines()[0])["engine"]
        seconds["engine auto"], steps = [], list[str]()
        for number in range(FIRST_TIMES):
            spent, steps = in_a_terminal([CLI, "predict", model, photo, "--engine", "auto"], str(Path(folder) / f"cache{number}"))
            seconds["engine auto"].append(spent)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    figures = {
        "what": "seconds from process start to exit, RepVGG-A0 at 224 px, warm file cache; medians of n rounds",
        "n": ROUNDS,
        "n_engine_auto": FIRST_TIMES,
        "seconds": median,
        "spread": {name: [min(s), max(s)] for name, s in seconds.items()},
        "limits": LIMITS,
        "kept": {name: median[name] <= limit for name, limit in LIMITS.items()},
        "predicted_by": engine,
        "live_line": steps,
        "fold_a0": fold,
    }
    write_record(Path(__file__).with_name("startup.json"), figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
