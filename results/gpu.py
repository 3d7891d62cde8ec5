"""Measure everything that this project wants to know of a GPU, most valuable first, in a given number of minutes.

python results/gpu.py --budget 25 --out results/gpu                        # a machine with one CUDA GPU
python results/gpu.py --budget 25 --out results/gpu --data cifar10.npz     # with CIFAR-10; without it nothing is trained
python results/gpu.py --pack hf:../shared/data/cifar10 cifar10.npz         # where the data are: into one file, to carry there
python results/gpu.py --device cpu --tiny --budget 3 --out /tmp/gpu        # tries all of it

It needs torch, timm, numpy, rich, safetensors, filelock, pillow and psutil, and `src` in PYTHONPATH; nothing is fetched. Each
step is a process of its own and leaves OUT/STEP.json, rewritten whole after each figure: whenever it is killed, what was
measured is there, and the same command goes on. OUT/STEP.log says what happened.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

GRACE = 20.0  # seconds beyond its share after which a step that does not look at the clock is ended


@dataclass(frozen=True)
class Step:
    """A step: the function `name` of `module`, and its share of the minutes that are left for it and those after it."""

    name: str
    module: str
    share: float
    needs_data: bool = False


STEPS = (
    Step("speed", "gpu_steps", 0.35),
    Step("training", "gpu_steps", 0.1),
    Step("cifar10", "gpu_training", 0.3, needs_data=True),
    Step("ablation", "gpu_training", 0.15, needs_data=True),
    Step("pspnet", "gpu_steps", 0.1),
)


def main(words: list[str]) -> int:
    """Run the steps; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=25, metavar="MINUTES", help="minutes for all steps together")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder for the figures; a second run there goes on")
    parser.add_argument("--data", default="", help="an .npz made by --pack, or what repvgg train --data takes; tiny: digits")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images: whether everything runs, not how fast")
    parser.add_argument("--pack", nargs=2, metavar=("SPEC", "FILE"), help="put the images of a data set into one .npz, and stop")
    parser.add_argument("--step", choices=[step.name for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.pack:
        import_module("gpu_training").pack(args.pack[0], Path(args.pack[1]))
        return 0
    args.data = args.data or ("digits" if args.tiny else "")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        _run(next(step for step in STEPS if step.name == args.step), args)
        return 0
    return _run_all([step for step in STEPS if args.data or not step.needs_data], args, words)


def _run(step: Step, args: argparse.Namespace) -> None:
    from gpu_steps import Asked, Record  # here: whoever starts the steps needs no PyTorch, and waits for none

    asked = Asked(args.device, args.tiny, args.data, args.out, args.until)
    getattr(import_module(step.module), step.name)(Record(args.out / f"{step.name}.json", asked), asked)


def _run_all(steps: list[Step], args: argparse.Namespace, words: list[str]) -> int:
    end, failed = time.time() + 60 * args.budget, []
    for number, step in enumerate(steps):
        left = end - time.time()
        until = time.time() + left * step.share / sum(s.share for s in steps[number:])
        print(f"{step.name}: {(until - time.time()) / 60:.1f} of {left / 60:.1f} minutes left", flush=True)
        command = [sys.executable, __file__, *words, "--step", step.name, "--until", str(until)]
        with (args.out / f"{step.name}.log").open("a") as log:
            code = _finish(command, log, min(until + GRACE, end) - time.time())
        print(f"{step.name}: {_ending(code)}", flush=True)
        if code not in (0, None):
            failed.append(step.name)
    return int(bool(failed))


def _finish(command: list[str], log: object, seconds: float) -> int | None:
    """Run a step and all that it starts; return its exit code, None where its time ran out first."""
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # type: ignore[call-overload]
    try:
        return int(process.wait(max(1.0, seconds)))
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this process is stopped
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(code: int | None) -> str:
    return {0: "done as far as its time went", None: "its time ran out"}.get(code, f"failed with exit code {code}, see its log")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
