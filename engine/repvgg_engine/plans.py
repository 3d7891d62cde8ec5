"""Plans: which algorithm computes each layer. They are measured once (tune.py), kept on disk, and can be shipped with a model.

    plan = repvgg_engine.plan("a0.safetensors")
    Path("a0.plan.json").write_text(plan.to_json())
    net = repvgg_engine.load("a0.safetensors", plan="a0.plan.json")      # measures nothing

By one plan an image gives the same bits in any batch, on any number of threads, and, of one build of the engine, on any machine
with the plan's instruction set. ("portable" is another one on x86, on aarch64 and in a browser.)
"""

import json
import math
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repvgg_engine.library import EngineError

VERSION = 1
MOST_BYTES = 10_000_000


@dataclass(frozen=True)
class Plan:
    """algorithms: one name for each layer, "" for those that are no convolutions. isa: the instruction set it is for."""

    isa: str
    precision: str
    algorithms: tuple[str, ...]

    def to_json(self) -> str:
        """Return the plan as text, for a file."""
        return json.dumps({"repvgg_engine_plan": VERSION, **asdict(self)}, indent=1) + "\n"


def parse(text: str) -> Plan:
    """Return the plan of a text that `Plan.to_json` wrote. Raises `EngineError`."""
    try:
        values: Any = json.loads(text)
        if values["repvgg_engine_plan"] != VERSION:
            raise EngineError(f"is a plan of version {values['repvgg_engine_plan']!r}, this engine reads {VERSION}")
        isa, precision, algorithms = values["isa"], values["precision"], values["algorithms"]
        words = (isa, precision, *algorithms)
        if not all(isinstance(word, str) and word.isascii() for word in words) or not isinstance(algorithms, list):
            raise EngineError("is not a plan, or a damaged one")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise error if isinstance(error, EngineError) else EngineError("is not a plan, or a damaged one") from None
    return Plan(isa, precision, tuple(algorithms))


def read(path: str | os.PathLike[str]) -> Plan:
    """Return the plan of a file. Raises `EngineError` that names it."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            return parse(file.read(MOST_BYTES))
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        reason = error if isinstance(error, EngineError) else "is not a plan, or a damaged one"
        raise EngineError(f"{path}: {reason}") from None


def check(plan: Plan, known: Sequence[Sequence[str]]) -> None:
    """Raise `EngineError` where a plan does not fit a net. known: the algorithms that fit each of its layers."""
    if len(plan.algorithms) != len(known):
        raise EngineError(f"the plan is of {len(plan.algorithms)} layers, the net has {len(known)}")
    for i, (name, fitting) in enumerate(zip(plan.algorithms, known, strict=True)):
        if name not in (fitting or [""]):
            raise EngineError(f"the plan computes layer {i} by {name!r}, which cannot be: {', '.join(fitting)}")


def cached(key: str) -> Plan | None:
    """Return the plan that was kept under a key; None where there is none, or none that can be read."""
    with suppress(EngineError):
        path = _path(key)
        return read(path) if path else None
    return None


def keep(key: str, plan: Plan) -> None:
    """Keep a plan on disk; one that cannot be kept costs the next process some seconds."""
    _write(_path(key), plan.to_json())


def cached_speeds(key: str, known: Sequence[Sequence[str]]) -> list[dict[str, float]] | None:
    """Return the speeds that were kept under a key, where they are of algorithms of such a net; None where there are none."""
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        path = _path(key, ".speeds")
        if path is None:
            return None
        speeds = json.loads(path.read_text())
        pairs = list(zip(speeds, known, strict=True))
        fits = all(of_layer.keys() <= set(names) and bool(of_layer) == bool(names) for of_layer, names in pairs)
        if fits and all(math.isfinite(seconds) and seconds >= 0 for of_layer in speeds for seconds in of_layer.values()):
            return [{name: float(seconds) for name, seconds in of_layer.items()} for of_layer in speeds]
    return None


def keep_speeds(key: str, speeds: list[dict[str, float]]) -> None:
    """Keep them on disk."""
    _write(_path(key, ".speeds"), json.dumps(speeds) + "\n")


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # it is still there where the disk is full


def _path(key: str, suffix: str = ".json") -> Path | None:
    """Return where it is kept; None where there is no home."""
    if asked := os.environ.get("REPVGG_ENGINE_CACHE"):
        return Path(asked) / f"{key}{suffix}"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repvgg_engine" / f"{key}{suffix}"
    except RuntimeError:
        return None
