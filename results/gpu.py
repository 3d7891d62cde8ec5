"""Measure everything that this project wants to know of a GPU, most valuable first, in a given number of minutes.

python results/gpu.py --budget 25 --out results/gpu                             # a machine with one CUDA GPU
python results/gpu.py --budget 25 --out results/gpu --data 'cifar10-*.npz'      # with CIFAR-10; without it nothing is trained
python results/gpu.py --pack hf:../shared/data/cifar10 cifar10.npz              # where the data are: cifar10-00.npz, ... and COMMIT
python results/gpu.py --device cpu --tiny --budget 3 --out /tmp/gpu             # tries all of it

It needs torch, numpy, timm and what that needs (torchvision, huggingface_hub, safetensors, pyyaml), and psutil with --device cpu;
`--wheels DIR` puts the wheels of a folder beside OUT and takes them first. Nothing is fetched; this package need not be installed.

Where commands are ended after some minutes, start it in a session of its own (`setsid nohup ... &`) and look at it by further
commands. OUT and the packed files are best in a folder that stays, such as /tmp.

Each step is a process of its own and leaves OUT/STEP.json, rewritten whole after each figure: whenever it is killed, what was
measured is there, and the same command goes on. Its log, and what training goes on from, are in the folder OUT-work.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

TRIES = 3  # starts of a step that ends by an error
GRACE = 20.0  # seconds beyond its share after which a step that does not look at the clock is ended
WATCH = 0.2  # seconds between two looks at whether the process that started a step is still there
HERE = Path(__file__).resolve().parent


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
    Step("pspnet", "gpu_steps", 0.1),
    Step("cifar10", "gpu_training", 0.3, needs_data=True),
    Step("ablation", "gpu_training", 0.15, needs_data=True),  # has use for all that the others leave
)


def main(words: list[str]) -> int:
    """Run the steps; return 1 if one of them failed, 2 if none can be run."""
    began, args = time.time(), _parsed(words)
    if args.step:
        _run(next(step for step in STEPS if step.name == args.step), args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is to be ended is ended on the way out
    _find([str(HERE.parent / "src"), str(HERE)])
    if args.pack:
        import_module("gpu_training").pack(args.pack[0], Path(args.pack[1]))
        return 0
    from repvgg.disk import FileError, hold

    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with hold(args.out):
            if args.wheels:
                _install(args.wheels, args.work / "site")
            if trouble := _trouble(args):
                print(trouble, file=sys.stderr)
                return 2
            steps = [step for step in STEPS if args.data or not step.needs_data]
            return _run_all(steps, args, words, began + 60 * args.budget)
    except FileError as error:
        print(error, file=sys.stderr)
        return 2


def _parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=25, metavar="MINUTES", help="minutes for all steps together")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder for the figures; a second run there goes on")
    parser.add_argument(
        "--data", default="", help="files made by --pack (a pattern), or what repvgg train --data takes; tiny: digits"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images: whether everything runs, not how fast")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels to take first, without what they need")
    parser.add_argument("--pack", nargs=2, metavar=("SPEC", "FILE"), help="put the images of a data set into .npz files, and stop")
    parser.add_argument("--step", choices=[step.name for step in STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.data.endswith(".npz") and not any(Path(args.data).parent.glob(Path(args.data).name)):
        parser.error(f"--data {args.data}: there is no such file")
    args.data = args.data or ("digits" if args.tiny else "")
    args.out = args.out.resolve()
    args.work = args.out.with_name(f"{args.out.name}-work")
    return args


# ----------------------------------------------------------------------------------------------------------- what it needs


def _find(folders: list[str]) -> None:
    """Let this process, and those that it starts, import from these folders first."""
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def _install(wheels: Path, site: Path) -> None:
    """Put the wheels of a folder where no other program sees them."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
    subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    _find([str(site)])


def _trouble(args: argparse.Namespace) -> str:
    """Say in a line why nothing can be measured here, if so. It also lets steps know which commit a copy was made of."""
    commit = Path(args.data).parent / "COMMIT"
    if commit.exists():
        os.environ.setdefault("REPVGG_COMMIT", commit.read_text().strip())
    code = "import sys, torch, timm, gpu_steps; torch.zeros(1, device=sys.argv[1])"  # not here: it would take memory of the GPU
    done = subprocess.run([sys.executable, "-c", code, args.device], capture_output=True, text=True)
    why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]  # of a signal there are no words
    return f"--device {args.device}: {why[-1]}" if done.returncode else ""


# -------------------------------------------------------------------------------------------------------------- the steps


def _run(step: Step, args: argparse.Namespace) -> None:
    """Run a step in this process, which ends with the one that started it."""
    if args.parent:
        threading.Thread(target=_end_after, args=(args.parent,), daemon=True).start()
    for compiler in ("TORCHINDUCTOR", "TRITON"):  # what was compiled is there the next time
        os.environ.setdefault(f"{compiler}_CACHE_DIR", str(args.work / compiler.lower()))
    from gpu_steps import Asked, Record  # here: whoever starts the steps needs no PyTorch, and waits for none

    asked = Asked(args.device, args.tiny, args.data if step.needs_data else "", args.work, args.until)
    getattr(import_module(step.module), step.name)(Record(args.out / f"{step.name}.json", asked), asked)


def _end_after(parent: int) -> None:
    """End this process, and all that it started, once its parent is gone: one that was killed could not do it."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os.killpg(0, signal.SIGKILL)


def _run_all(steps: list[Step], args: argparse.Namespace, words: list[str], end: float) -> int:
    failed = []
    for number, step in enumerate(steps):
        if (left := end - time.time()) <= 0:
            print(f"no time is left for {', '.join(s.name for s in steps[number:])}", flush=True)
            break
        until = time.time() + left * step.share / sum(s.share for s in steps[number:])
        print(f"{step.name}: {(until - time.time()) / 60:.1f} of {left / 60:.1f} minutes left", flush=True)
        command = [sys.executable, __file__, *words, "--step", step.name, "--until", str(until), "--parent", str(os.getpid())]
        for _ in range(TRIES):  # what crashed it comes last the next time (see Record.each)
            with (args.work / f"{step.name}.log").open("a") as log:
                code = _finish(command, log, min(until + GRACE, end) - time.time())
            if code in (0, None) or time.time() > until:
                break
        print(f"{step.name}: {_ending(code)}", flush=True)
        if code not in (0, None):
            failed.append(step.name)
    return int(bool(failed))


def _finish(command: list[str], log: object, seconds: float) -> int | None:
    """Run a step and all that it starts; return its exit code, None where its time ran out first."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what it said last tells why it was killed
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)  # type: ignore[call-overload]
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
