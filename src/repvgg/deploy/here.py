"""Engines that this machine has, and how fast each was when `--engine auto` last measured them."""

import json
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from repvgg.deploy.engines import ENGINES
from repvgg.disk import cache_folder


@dataclass(frozen=True)
class Here:
    """An engine as it is found here.

    version: of its runtime; None where it is missing, and `remedy` says how to get it. images_per_second: when the engines were
    last measured, None where this one was not among them.
    """

    name: str
    version: str | None
    on_cpu: tuple[str, ...]
    on_cuda: tuple[str, ...]
    remedy: str = ""
    images_per_second: float | None = None


def engines_here() -> tuple[list[Here], dict[str, Any] | None]:
    """Return all engines, and for what they were last measured (the options of engines/__init__.py); None if they never were."""
    last = _last_measurement()
    speeds = {name: figures["images_per_second"] for name, figures in last["engines"].items()} if last else {}
    found = []
    for name, known in ENGINES.items():
        missing = [package for package in known.packages if find_spec(package) is None]
        version = None if missing else _version((known.packages or ("torch",))[-1])
        found.append(Here(name, version, known.on_cpu, known.on_cuda, known.remedy if missing else "", speeds.get(name)))
    return found, last["options"] if last else None


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "here"


def _last_measurement() -> dict[str, Any] | None:
    times = {}
    for path in (cache_folder() / "engines").glob("*.json"):
        with suppress(OSError):  # another process has just replaced it
            times[path] = path.stat().st_mtime
    for path in sorted(times, key=lambda path: times[path], reverse=True):
        with suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            if isinstance(found, dict) and {"engines", "options"} <= found.keys():
                return found
    return None
