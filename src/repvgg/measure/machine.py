"""The machine, versions, commit and time that every measured figure carries."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from repvgg.disk import write_text

PACKAGES = ("repvgg", "repvgg-engine", "torch", "torchvision", "timm", "onnxruntime", "openvino", "ncnn", "MNN", "nncf", "numpy")


def this_machine(device: str = "") -> dict[str, Any]:
    """Return processor, cores, threads, memory, GPU, system, versions of what computes, commit of the code.

    device: that the figures are of, where one was chosen; a GPU that had no part in them is not named.
    Where our engine is installed, also the processor's family, model, caches and instruction sets.
    """
    import torch

    gpu = torch.cuda.is_available() and (not device or device.startswith("cuda"))
    return {
        "processor": _processor(),
        **_kind(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        if hasattr(os, "sysconf")
        else None,
        "gpu": torch.cuda.get_device_name(device or None) if gpu else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def choose_device(name: str = "") -> str:
    """Return the device of that name, by default the first one. Raises ValueError for one that this machine lacks."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = [*(["cuda", *gpus] if gpus else []), "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if name and name not in devices:
        raise ValueError(f"no device {name!r} here: {', '.join(devices)}")
    return name or devices[0]


def threads(count: int) -> str:
    """Write a number of threads in words."""
    return "1 thread" if count == 1 else f"{count} threads"


def write_record(path: Path, figures: dict[str, Any], device: str = "") -> None:
    """Write figures as JSON, with the machine that they were measured on; device: see `this_machine`."""
    text = json.dumps({**figures, "machine": this_machine(device)}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _kind() -> dict[str, Any]:
    """Return what tells processors of one brand apart, where our engine is there to say it: an "AMD EPYC" may be any of many."""
    try:
        import repvgg_engine
        from repvgg_engine.machine import processor
    except ImportError:
        return {}
    return {"kind": processor(), "instruction_sets": repvgg_engine.instruction_sets()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with "+" where files were changed since.

    Of a copy that is no checkout, what REPVGG_COMMIT says; else None.
    """
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        # Installed inside somebody's checkout, it is not that checkout's commit.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)  # noqa: S603
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REPVGG_COMMIT") or None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
