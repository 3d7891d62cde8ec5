"""Which algorithm for which layer: measured on this machine, under a budget for the output's error and one for time.

    1. Measure what each algorithm that may pay costs each layer (speed.py).
    2. Measure against float64 how much an error in each kind of layer moves the output.
    3. Choose the fastest combination whose errors, added as squares, stay within the budget (and whose weights within the limit).
    4. Check that on the whole net; if the errors add up to more, watch the largest tiles that were guessed, then tighten the
       budget, and choose again.

The budget is a multiple of the error that remains where every convolution is direct, so that a deep or ill-conditioned net is
judged by its own measure; for "fast" it is at least a number. It holds for smooth images and for noise, each by itself. Where time
is short, kinds of layers that were not measured are taken to add equal shares of the error; the check in the end is what counts.

One choice serves calls of any number of images, so weights are packed once and an image gives the same bits in any company: what a
layer costs is its share of the time of one image plus its share of the time of many.

Where products may be of bfloat16 or of integers, float32 is among the choices: Winograd's large tiles in float32 can be as fast as
small ones in bfloat16, the error that they save lets other layers have larger tiles in bfloat16, and rounding to integers does not
pay where channels are few.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine import reference
from repvgg_engine.costs import macs
from repvgg_engine.layers import Array, Conv
from repvgg_engine.machine import one_blas_thread, return_memory
from repvgg_engine.net import Net
from repvgg_engine.speed import Clock, Say, Shares, ending_of, geometry, input_size, shrunk, silent

VERSION = 11
# What the output's error may be: a multiple of the direct algorithm's, and for "fast" at least a number.
TIMES_DIRECT = {
    ("fp32", "high"): 4.4,
    ("fp32", "fast"): 4.4,
    ("bf16", "high"): 1.25,
    ("bf16", "fast"): 1.5,
    ("int16", "high"): 4.4,
    ("int16", "fast"): 8.8,
    ("int8", "high"): 1.0,
    ("int8", "fast"): 1.25,
}
FAST = 2e-4
TINY = 1e-15  # allowed always: less than float32 errs by, but for a net whose output is its last bias, with an error of 0
# The error that an algorithm adds in a layer, as a multiple of the direct one's: a property of its matrices, the same within 5% in
# float32 and in bfloat16, with AVX-512, AVX2 and SSE2, for 192 channels and for 512. The check in the end does not rest on it.
GROWTH = {"direct": 1.0, "F2": 1.7, "F4": 4.9, "F5": 9.6, "F6": 20.5, "F7": 49.0}
# An error is watched through the net in one layer computed by the first of these that it has: large enough to show. Weights of more
# bytes than that, or than half of the limit, are not made for it.
WATCHED, MOST_WATCHED_BYTES = ("F5", "F4", "F2"), 64 << 20
# Of each kind of calibration images. They have at most so many MACs in all, where that leaves the least side; or they are half as
# many.
CALIBRATION_IMAGES, MOST_CALIBRATION_MACS = 4, 3e9
# For the reference and for watching errors, of which there may be none; the checks come on top. In int8 each algorithm is watched,
# and int16 too.
SECONDS, SECONDS_INT8, MOST_CHECKS = 0.9, 2.1, 8
# After the first checks that fail, so many guesses are put right.
MOST_PUT_RIGHT = 3
# A choice is kept that spends so much of the budget, or of what another was refused for: guesses may be wrong in both directions.
NEAR = 0.7

Squares = NDArray[np.float64]  # of errors, for each kind of images


@dataclass(frozen=True)
class Option:
    """A layer by one algorithm: its share of the time of a call, what it adds to the square of the output's error on each kind of
    images, bytes of weights."""

    algorithm: str
    seconds: float
    error: Squares
    bytes: int


def choose_algorithms(net: Net, accuracy: str, memory_limit: int, seconds: Shares, say: Say = silent) -> list[str]:
    """Return an algorithm for each layer, "" for those that are no convolutions, and have the net run by them.

    seconds: of `speed.measure_speed`. say: is told what is at hand.
    """
    clock = Clock(SECONDS_INT8 if net.precision == "int8" else SECONDS, net.threads)
    say("the reference in float64")
    errors = _Errors(net, calibration_images(net), accuracy, memory_limit)
    added = errors.added(seconds, clock, say)
    options = [
        [Option(name, of_layer[name], added[i][name], net.weight_bytes(i, name)) for name in of_layer]
        for i, of_layer in enumerate(seconds)
    ]
    room = 1 - errors.of_exact
    kept: list[str] = []
    share, passed, failed = 1.0, 0.0, 1.0  # of the room: to try, and the largest that kept the budget, the least that did not
    for attempt in range(MOST_PUT_RIGHT + MOST_CHECKS):
        say(f"checking the whole net, {attempt + 1}")
        names = choose(options, share * room, memory_limit)
        worst = float(errors.of(names).max())
        if worst <= 1:
            kept, passed = names, share
        elif errors.put_right(names, options):
            continue
        else:
            failed = share
        if kept and (worst >= NEAR or passed >= NEAR * failed):
            break
        share = (passed * failed) ** 0.5 if kept else share * min(0.9, 0.95 / worst)
    if kept:
        net.choose_all(kept)
        return kept
    # Those that should not leave the budget, whatever the layer adds: of few tiles' growth, or of another precision than the net's.
    most, own = TIMES_DIRECT[net.precision, accuracy], errors.ending
    safe = [
        [o for o in of_layer if not o.algorithm.endswith(own) or GROWTH.get(o.algorithm.removesuffix(own), 1.0) <= most]
        for of_layer in options
    ]
    names = choose(safe, np.full_like(room, np.inf), memory_limit)
    if float(errors.of(names).max()) > 1:  # as the largest tiles of int16 may beside direct int8
        names = errors.direct
    net.choose_all(names)
    return names


class _Errors:
    """Squares of the output's error on each kind of images, 1 being what is allowed."""

    def __init__(self, net: Net, images: Array, accuracy: str, memory_limit: int) -> None:
        self.net, self.most_bytes = net, min(MOST_WATCHED_BYTES, memory_limit // 2)
        self.direct = [names[0] if names else "" for names in net.known]
        self.exact = ["direct" if name else "" for name in self.direct]  # in float32
        self.ending = "" if net.precision == "fp32" else f" {net.precision}"
        self.kinds = np.split(images, 2)  # smooth, noise
        self.alike: list[list[int]] = []  # layers that are alike
        self.known: set[tuple[int, str]] = set()  # algorithms that were watched, and in which of them: by its first layer
        with one_blas_thread(), ThreadPoolExecutor(min(len(self.kinds), net.threads)) as pool:
            self.wanted = list(pool.map(partial(reference.run, net.layers), self.kinds))
        return_memory()
        self.allowed = np.ones(len(self.kinds))
        least = FAST**2 if (net.precision, accuracy) == ("fp32", "fast") else TINY**2
        of_exact = self.of(self.exact)
        of_direct = self.of(self.direct) if self.ending else of_exact
        self.allowed = np.maximum(TIMES_DIRECT[net.precision, accuracy] ** 2 * of_direct, least)
        self.of_exact, self.of_direct = of_exact / self.allowed, of_direct / self.allowed

    def of(self, names: Sequence[str]) -> Squares:
        """Return the error with these algorithms."""
        self.net.choose_all(names)
        pairs = zip(self.kinds, self.wanted, strict=True)
        return np.array([reference.error(self.net.run(kind), wanted) ** 2 for kind, wanted in pairs]) / self.allowed

    def added(self, seconds: Shares, clock: Clock, say: Say) -> list[dict[str, Squares]]:
        """Return what each algorithm adds in each layer, watched in the middle one of those that are alike, while there is time.

        Those come first where the choice matters most.
        """
        alike: dict[Any, list[int]] = {}
        for i, layer in enumerate(self.net.layers):
            if isinstance(layer, Conv):
                eight = tuple(name for name in seconds[i] if name.endswith(" int8"))
                alike.setdefault((geometry(layer), eight), []).append(i)
        self.alike = list(alike.values())
        at_stake = [max(of_layer.values(), default=0) - min(of_layer.values(), default=0) for of_layer in seconds]
        equal_share = self.of_direct / sum(map(len, alike.values()))
        added: list[dict[str, Squares]] = [{} for _ in seconds]
        for kind, layers in enumerate(sorted(alike.values(), key=lambda layers: -sum(at_stake[i] for i in layers))):
            say(f"errors, {kind + 1} of {len(alike)} kinds of layers")
            watched = layers[len(layers) // 2]
            for ending in dict.fromkeys(map(ending_of, seconds[watched])):  # "", and perhaps " int16", ...
                if ending == " int8" and clock.has():  # each of them rounds in a way of its own
                    own = {name: self._watched(watched, name) for name in seconds[watched] if name.endswith(ending)}
                    for i in layers:
                        added[i] |= own
                    continue
                unit = self._unit(watched, ending) if clock.has() or (ending == "" != self.ending) else None
                for i in layers:
                    for name in seconds[i]:
                        if name.removesuffix(ending) in GROWTH:
                            growth = GROWTH[name.removesuffix(ending)] ** 2
                            added[i][name] = (equal_share if unit is None else unit) * (growth - (ending == ""))
        return added

    def put_right(self, names: Sequence[str], options: list[list[Option]]) -> bool:
        """Watch the largest tile that was chosen by a guess, and put right what it adds; False if that was done often."""
        guessed = [
            (GROWTH[name.split()[0]], layers, name)
            for layers in self.alike
            for name in dict.fromkeys(names[i] for i in layers)
            if (layers[0], name) not in self.known
        ]
        if not guessed or len(self.known) == MOST_PUT_RIGHT:
            return False
        _, layers, name = max(guessed, key=lambda found: found[0])
        adds = self._watched(layers[len(layers) // 2], name)
        self.known.add((layers[0], name))
        for i in layers:
            options[i] = [replace(option, error=adds) if option.algorithm == name else option for option in options[i]]
        return True

    def _unit(self, layer: int, ending: str) -> Squares | None:
        """Return what the direct algorithm of a layer adds, by an algorithm that adds more of it; None where that takes long."""
        if ending == "" != self.ending:
            return np.zeros_like(self.of_exact)  # float32 adds nothing beside the other precision
        name = next((n for n in WATCHED if n + ending in self.net.known[layer]), "direct") + ending
        if self.net.weight_bytes(layer, name) > self.most_bytes:
            return None
        grown = GROWTH[name.removesuffix(ending)] ** 2 - (ending == "")
        return self._watched(layer, name) / grown if grown else np.zeros_like(self.of_exact)

    def _watched(self, layer: int, name: str) -> Squares:
        """Return what one layer by that algorithm adds."""
        return np.maximum(self.of([*self.exact[:layer], name, *self.exact[layer + 1 :]]) - self.of_exact, 0)


def calibration_images(net: Net) -> Array:
    """Return images of mean 0 and deviation 1, of the input size or less where float64 would take long.

    First smooth patterns, rather like photographs, then as many of pure noise, on which errors of the early layers weigh more.
    """
    most = MOST_CALIBRATION_MACS / (2 * CALIBRATION_IMAGES)
    size = shrunk(net.layers, input_size(net), most)
    count = CALIBRATION_IMAGES if macs(net.layers, size) <= most else CALIBRATION_IMAGES // 2
    random = np.random.default_rng(0)
    coarse = random.standard_normal((count, net.channels, 7, 7))
    at = [np.linspace(0, 6, n) for n in size]
    weights = [np.maximum(0, 1 - np.abs(a[:, None] - np.arange(7))) for a in at]  # linear interpolation
    smooth = np.einsum("yi,ncij,xj->ncyx", weights[0], coarse, weights[1])
    noise = random.standard_normal((2, *smooth.shape))
    return np.concatenate([smooth * 1.3 + noise[0] * 0.4, noise[1]]).astype(np.float32)


def choose(options: Sequence[Sequence[Option]], error: Squares, memory: int) -> list[str]:
    """Return an option of each layer: as little time as the budgets for errors and memory allow; "" for layers without options.

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
                if not saved > 0 or (spent_error + np.maximum(more, 0) > error).any() or spent_memory + max(bigger, 0) > memory:
                    continue
                price = max(float((more / np.maximum(error, 1e-300)).max()), 0.0) + 0.1 * max(bigger, 0) / room
                worth = saved / max(price, 1e-12)
                if best is None or worth > best[0]:
                    best = worth, i, option
        if best is None:
            return [o.algorithm if o else "" for o in chosen]
        chosen[best[1]] = best[2]
