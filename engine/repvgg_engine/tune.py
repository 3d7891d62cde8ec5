"""Which algorithm for which layer: measured on this machine, under a budget for the output's error, and remembered on disk.

    1. Time every layer by every algorithm that fits it, in the whole net, for one image and for many.
    2. Measure against float64 how much error each algorithm adds to the output, for all layers of one shape together, while the
       others are as exact as can be.
    3. Choose the fastest combination whose errors, added as squares, stay within the budget (and whose weights within the limit).
    4. Check that on the whole net; if the errors add up to more, tighten the budget and choose again.

The budget is a multiple of the error that remains where every convolution is direct, so that a deep or ill-conditioned net is
judged by its own measure; for "fast" it is at least a number. It holds for smooth images and for noise, each by itself.

Where products may be of bfloat16, float32 is among the choices: Winograd's large tiles in float32 can be as fast as small ones in
bfloat16, and the error that they save lets other layers have larger tiles in bfloat16.
"""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine import reference
from repvgg_engine.layers import Array, Conv
from repvgg_engine.library import LARGE_BATCH, instruction_sets

if TYPE_CHECKING:
    from repvgg_engine.net import Net

VERSION = 3
# What the output's error may be: a multiple of the direct algorithm's, and for "fast" at least a number.
TIMES_DIRECT = {("fp32", "high"): 4.4, ("fp32", "fast"): 4.4, ("bf16", "high"): 1.25, ("bf16", "fast"): 1.5}
FAST = 2e-4
# Of each kind of calibration images.
CALIBRATION_IMAGES = LARGE_BATCH
# Timing takes so many images at a time, fewer for large nets: about a second's work.
MOST_IMAGES, MACS = 16, 1e11
# Errors are measured on images of at most so many MACs in all, where that leaves the least side.
MOST_CALIBRATION_MACS, LEAST_SIDE = 4e11, 16
# The least of so many runs counts; of one image, that is little work.
REPEATS, REPEATS_OF_ONE = 3, 20
# Of the machine's memory, for weights.
MEMORY_SHARE = 1 / 8

Squares = NDArray[np.float64]  # of errors, for each kind of images


@dataclass(frozen=True)
class Option:
    """A layer by one algorithm: seconds for the timed batch, what it adds to the square of the output's error on each kind of
    images, bytes of weights."""

    algorithm: str
    seconds: float
    error: Squares
    bytes: int


class Tuning:
    """What a net has to do before its first call."""

    def __init__(self, accuracy: str, memory_limit: int | None) -> None:
        self.accuracy, self.memory_limit = accuracy, memory_limit
        self._lock, self._done = threading.Lock(), False

    def ensure(self, net: "Net") -> None:
        """Choose the net's algorithms, from disk if they were measured before. Once; other callers wait."""
        if self._done:
            return
        with self._lock:
            if self._done:
                return
            path = self._path(net)
            choices = _read(path, net) or _measure(net, self.accuracy, self.memory_limit or _memory_limit())
            for large, names in enumerate(choices):
                _apply(net, names, bool(large))
            _write(path, choices)
            self._done = True

    def _path(self, net: "Net") -> Path:
        machine = [_processor(), instruction_sets(), os.environ.get("REPVGG_ENGINE_ISA"), net.threads]
        asked = [self.accuracy, net.precision, self.memory_limit]
        key = hashlib.sha256(json.dumps([VERSION, machine, asked]).encode() + _fingerprint(net)).hexdigest()[:32]
        folder = (
            os.environ.get("REPVGG_ENGINE_CACHE")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repvgg_engine"
        )
        return Path(folder) / f"{key}.json"


def _measure(net: "Net", accuracy: str, memory_limit: int) -> list[list[str]]:
    """The algorithms of each layer, for calls of few images and for calls of many."""
    batch = np.random.default_rng(0).standard_normal((_timed_images(net), net.channels, *_input_size(net)), np.float32)
    seconds = [_time(net, batch[:1], REPEATS_OF_ONE, large=False), _time(net, batch, REPEATS, large=True)]
    errors = _Errors(net, calibration_images(net), accuracy)
    added = errors.added()
    choices = []
    for times in seconds:
        options = [
            [Option(name, times[i][name], added[i][name], net.weight_bytes(i, name)) for name in net.algorithms(i)]
            for i in range(len(net.layers))
        ]
        left = 1 - errors.of(errors.exact)
        for _ in range(8):
            names = choose(options, left, memory_limit)
            worst = errors.of(names).max()
            if worst <= 1:
                break
            left *= min(0.95, 0.98 / worst)
        else:
            names = errors.direct
        choices.append(names)
    return choices


class _Errors:
    """Squares of the output's error on each kind of images, 1 being what is allowed."""

    def __init__(self, net: "Net", images: Array, accuracy: str) -> None:
        self.net = net
        self.direct = [next(iter(net.algorithms(i)), "") for i in range(len(net.layers))]
        self.exact = ["direct" if name else "" for name in self.direct]  # in float32
        self.kinds = np.split(images, len(images) // CALIBRATION_IMAGES)
        self.wanted = [reference.run(net.layers, kind) for kind in self.kinds]
        self.allowed = np.ones(len(self.kinds))
        least = FAST**2 if (net.precision, accuracy) == ("fp32", "fast") else 0.0
        self.allowed = np.maximum(TIMES_DIRECT[net.precision, accuracy] ** 2 * self.of(self.direct), least)

    def of(self, names: Sequence[str]) -> Squares:
        """With these algorithms."""
        _apply(self.net, names, large=True)
        pairs = zip(self.kinds, self.wanted, strict=True)
        return np.array([reference.error(self.net.run(kind), wanted) ** 2 for kind, wanted in pairs]) / self.allowed

    def added(self) -> list[dict[str, Squares]]:
        """Of each layer, what each algorithm adds; layers of one shape share it evenly."""
        base = self.of(self.exact)
        shapes: dict[Any, list[int]] = {}
        for i, layer in enumerate(self.net.layers):
            if isinstance(layer, Conv):
                shapes.setdefault((layer.weight.shape, layer.stride, layer.dilation, layer.groups), []).append(i)
        added: list[dict[str, Squares]] = [{} for _ in self.net.layers]
        for alike in shapes.values():
            for name in self.net.algorithms(alike[0]):
                names = [name if i in alike else other for i, other in enumerate(self.exact)]
                nothing = name == "direct" or (self.net.precision == "bf16" and not name.endswith("bf16"))  # beside bfloat16's
                more = np.zeros_like(base) if nothing else (self.of(names) - base) / len(alike)
                for i in alike:
                    added[i][name] = more
        return added


def calibration_images(net: "Net") -> Array:
    """Of the input size, or smaller where float64 would take minutes, with mean 0 and deviation 1: first smooth patterns, rather
    like photographs, then as many of pure noise, on which errors of the early layers weigh more."""
    size = _input_size(net)
    while 2 * CALIBRATION_IMAGES * _macs(net, size) > MOST_CALIBRATION_MACS and min(size) >= 2 * LEAST_SIDE:
        size = size[0] // 2, size[1] // 2
    random = np.random.default_rng(0)
    coarse = random.standard_normal((CALIBRATION_IMAGES, net.channels, 7, 7))
    at = [np.linspace(0, 6, n) for n in size]
    weights = [np.maximum(0, 1 - np.abs(a[:, None] - np.arange(7))) for a in at]  # linear interpolation
    smooth = np.einsum("yi,ncij,xj->ncyx", weights[0], coarse, weights[1])
    noise = random.standard_normal((2, *smooth.shape))
    return np.concatenate([smooth * 1.3 + noise[0] * 0.4, noise[1]]).astype(np.float32)


def _timed_images(net: "Net") -> int:
    """So many that they take about a second."""
    return max(LARGE_BATCH, min(MOST_IMAGES, int(MACS / _macs(net, _input_size(net)))))


def _input_size(net: "Net") -> tuple[int, int]:
    return (net.preprocessing.height, net.preprocessing.width) if net.preprocessing else (224, 224)


def _macs(net: "Net", size: tuple[int, int]) -> int:
    """Of one image."""
    macs, (height, width) = 0, size
    for layer in net.layers:
        if isinstance(layer, Conv):
            height, width = -(-height // layer.stride[0]), -(-width // layer.stride[1])
            macs += layer.weight.size * height * width
    return macs


def _time(net: "Net", images: Array, repeats: int, large: bool) -> list[dict[str, float]]:
    """Of each layer, the seconds by each of its algorithms: the least of a few runs."""
    known = [net.algorithms(i) for i in range(len(net.layers))]
    seconds: list[dict[str, float]] = [{} for _ in known]
    for turn in range(max(map(len, known))):
        names = [of_layer[min(turn, len(of_layer) - 1)] if of_layer else "" for of_layer in known]
        _apply(net, names, large)
        for repeat in range(repeats + 1):
            net.profile()
            net.run(images)
            if repeat > 0:  # the first lays out memory and weights
                for times, name, taken in zip(seconds, names, net.profile(), strict=True):
                    times[name] = min(times.get(name, taken), taken)
    return seconds


def choose(options: Sequence[Sequence[Option]], error: Squares, memory: int) -> list[str]:
    """One option of each layer: as little time as the budgets for errors and for memory allow. Layers without options get "".

    From the most accurate ones, take in turn the exchange that saves most time for what it costs of the budgets.
    """
    chosen = [min(of_layer, key=lambda o: (o.error.max(), o.seconds)) if of_layer else None for of_layer in options]
    least = [min((o.bytes for o in of_layer), default=0) for of_layer in options]
    if sum(o.bytes for o in chosen if o) > memory:  # accuracy may take more than memory has: start from the smallest
        chosen = [min(of_layer, key=lambda o: (o.bytes, o.error.max())) if of_layer else None for of_layer in options]
    room = max(1, memory - sum(least))
    while True:
        spent_error, spent_memory = sum((o.error for o in chosen if o), np.zeros_like(error)), sum(o.bytes for o in chosen if o)
        best: tuple[float, int, Option] | None = None
        for i, (now, of_layer) in enumerate(zip(chosen, options, strict=True)):
            for option in of_layer:
                assert now is not None
                saved, more, bigger = now.seconds - option.seconds, option.error - now.error, option.bytes - now.bytes
                if saved <= 0 or (spent_error + np.maximum(more, 0) > error).any() or spent_memory + max(bigger, 0) > memory:
                    continue
                price = max(float((more / np.maximum(error, 1e-300)).max()), 0.0) + 0.1 * max(bigger, 0) / room
                worth = saved / max(price, 1e-12)
                if best is None or worth > best[0]:
                    best = worth, i, option
        if best is None:
            return [o.algorithm if o else "" for o in chosen]
        chosen[best[1]] = best[2]


def _fingerprint(net: "Net") -> bytes:
    """Tells nets apart: shapes, and samples of the weights."""
    digest = hashlib.sha256(repr(net.preprocessing).encode())
    for layer in net.layers:
        for value in vars(layer).values():
            is_array = isinstance(value, np.ndarray)
            digest.update(repr(value.shape if is_array else value).encode())
            if is_array:
                digest.update(value.reshape(-1)[:: 1 + value.size // 1024].tobytes())
    return digest.digest()


def _apply(net: "Net", names: Sequence[str], large: bool) -> None:
    for i, name in enumerate(names):
        if name:
            net.choose(i, name, large)


def _read(path: Path, net: "Net") -> list[list[str]] | None:
    """What was chosen before; None where nothing is, or nothing that fits this net."""
    try:
        choices = json.loads(path.read_text())["choices"]
        fits = len(choices) == 2 and all(
            len(names) == len(net.layers) and all(name in (net.algorithms(i) or [""]) for i, name in enumerate(names))
            for names in choices
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return choices if fits else None


def _write(path: Path, choices: list[list[str]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a cache that cannot be written costs the next process some seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"choices": choices}))
        temporary.replace(path)


def _memory_limit() -> int:
    return int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return os.uname().machine
