"""The constants of the native engine's plans (engine/src: pieces, plan, net, pool), each swept alone; writes results/plan.json.

python results/measure_plan.py [CONSTANT ...]      # on a machine that does nothing else; four minutes, most of it compiling

Each value is a library of its own in a process of its own; those of a constant take turns on one plan of RepVGG-A0, and their
answers must be the same bits. Figures are milliseconds a call: medians over rounds.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import repvgg_engine
from measure_engine import THREADS, model_file
from records import keep, say

ENGINE = Path(__file__).parents[1] / "engine"
OUT = Path(__file__).with_name("plan.json")
ROUNDS = 5
# Images, their side, features instead of logits, and calls in a turn.
WORK = {
    "batch 1": (1, 224, False, 12),
    "batch 8": (8, 224, False, 2),
    "batch 32": (32, 224, False, 1),
    "features of 448 px": (1, 448, True, 4),
}
# The file of each constant and the values that are tried.
SWEEPS = {
    "BLOCK_BYTES": ("pieces.cpp", ["160 << 10", "320 << 10", "640 << 10", "1280 << 10"]),
    "BLOCKS_OF_WEIGHTS": ("pieces.cpp", ["8", "32", "128"]),
    "SMALLEST_BLOCK": ("pieces.cpp", ["8", "16", "48", "96"]),
    "FEW_TILES": ("pieces.cpp", ["2", "8", "32"]),
    "MANY_WEIGHTS": ("pieces.cpp", ["2", "8", "32"]),
    "WHOLE_GROUPS": ("pieces.cpp", ["1", "4", "16"]),
    "WORTH_A_PIECE": ("plan.cpp", ["1 << 13", "1 << 16", "1 << 19"]),
    "FEW_IMAGES": ("net.cpp", ["4", "8", "16", "32"]),
    "PATIENCE": ("pool.cpp", ["20", "200", "2000"]),
}
DECLARED = r"\b{} = (?:[\w:]+\()?([^,;()]+)"
WORKER = """
import hashlib, json, sys, time
import numpy as np
import repvgg_engine
path, plan, threads, works = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
nets = {features: repvgg_engine.load(path, plan=plan, threads=threads, features=features) for features in (False, True)}
for line in sys.stdin:
    n, side, features, calls = works[line.strip()]
    net, images = nets[features], np.random.default_rng(0).standard_normal((n, 3, side, side), np.float32)
    answer = net(images)
    began = time.perf_counter()
    for _ in range(calls):
        net(images)
    print((time.perf_counter() - began) / calls * 1e3, hashlib.sha256(answer.tobytes()).hexdigest(), flush=True)
"""


class Builds:
    """The engine built with a constant changed: its kernels once, and the changed file again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.build = folder, ENGINE / "build" / "plan"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        run("cmake", "-S", ENGINE, "-B", self.build, *generator)
        run("cmake", "--build", self.build, "--parallel", os.cpu_count() or 1)

    def variant(self, constant: str, value: str) -> Path:
        """Return a folder to import repvgg_engine from, whose library has that value."""
        name, _ = SWEEPS[constant]
        site = self.folder / re.sub(r"\W+", "_", f"{constant} {value}")
        shutil.copytree(ENGINE / "repvgg_engine", site / "repvgg_engine")
        source = site / name
        source.write_text(changed((ENGINE / "src" / name).read_text(), constant, value))
        compiler, made = os.environ.get("CXX", "c++"), site / "changed.o"
        run(compiler, "-std=gnu++17", "-O3", "-fPIC", "-fvisibility=hidden", "-I", ENGINE / "src", "-c", source, "-o", made)
        others = [path for path in self.build.rglob("*.o") if path.name != f"{name}.o" and "CMakeFiles" in path.parts]
        others = [path for path in others if "CompilerId" not in str(path)]
        run(compiler, "-shared", "-pthread", made, *others, "-o", site / "repvgg_engine" / "librepvgg_engine.so")
        return site


def run(*words: object) -> None:
    """Run a command that says nothing unless it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def declared(text: str, constant: str) -> re.Match[str]:
    """Return where a source gives the constant its value, the first group."""
    found = re.search(DECLARED.format(constant), text)
    assert found, constant
    return found


def changed(text: str, constant: str, value: str) -> str:
    """Return a source with another value of the constant."""
    start, end = declared(text, constant).span(1)
    return text[:start] + value + text[end:]


class Worker:
    """A process that runs one variant."""

    def __init__(self, site: Path, path: Path, plan: Path) -> None:
        command = [sys.executable, "-P", "-c", WORKER, str(path), str(plan), str(THREADS), json.dumps(WORK)]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def time(self, work: str) -> tuple[float, str]:
        """Return milliseconds a call, and what the answer hashes to."""
        assert self.process.stdin
        assert self.process.stdout
        print(work, file=self.process.stdin, flush=True)
        milliseconds, answer = self.process.stdout.readline().split()
        return float(milliseconds), answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def sweep(constant: str, sites: dict[str, Path], path: Path, plan: Path) -> dict[str, Any]:
    """Return the figures of one constant; its values take turns."""
    workers = {value: Worker(site, path, plan) for value, site in sites.items()}
    times: dict[str, dict[str, list[float]]] = {work: {value: [] for value in sites} for work in WORK}
    for turn in range(ROUNDS + 1):
        for work in WORK:
            answers = set()
            for value, worker in workers.items():
                milliseconds, answer = worker.time(work)
                answers.add(answer)
                times[work][value] += [milliseconds] * (turn > 0)  # the first warms up
            assert len(answers) == 1, f"{constant} changes the bits of {work}"
    for worker in workers.values():
        worker.close()
    name, _ = SWEEPS[constant]
    chosen = declared((ENGINE / "src" / name).read_text(), constant)[1]
    for work, of_value in times.items():
        say(f"{constant} ({chosen}), {work}: " + ", ".join(f"{v}: {statistics.median(t):.2f} ms" for v, t in of_value.items()))
    return {"file": name, "chosen": chosen, "milliseconds_by_round": times}


def main() -> None:
    protocol = {"threads": THREADS, "rounds": ROUNDS, "about": __doc__}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        path, plan = model_file("repvgg_a0", folder), folder / "plan.json"
        plan.write_text(repvgg_engine.plan(path, threads=THREADS).to_json())
        builds, constants = Builds(folder), sys.argv[1:] or list(SWEEPS)
        sites = {c: dict(zip(SWEEPS[c][1], pool.map(builds.variant, [c] * 9, SWEEPS[c][1]), strict=False)) for c in constants}
        for constant in constants:
            keep(OUT, constant, sweep(constant, sites[constant], path, plan), {"protocol": protocol})


if __name__ == "__main__":
    main()
