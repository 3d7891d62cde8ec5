"""Which algorithm for which layer: measured on this machine, under a budget for the output's error; a few seconds for any net.

    1. Guess what each algorithm costs each layer, and leave out those that cannot pay.
    2. Time the others, in a net that has each kind of layer once, for one image and for a few.
    3. Measure against float64 how much an error in each kind of layer moves the output.
    4. Choose the fastest combination whose errors, added as squares, stay within the budget (and whose weights within the limit).
    5. Check that on the whole net; if the errors add up to more, tighten the budget and choose again.

The budget is a multiple of the error that remains where every convolution is direct, so that a deep or ill-conditioned net is
judged by its own measure; for "fast" it is at least a number. It holds for smooth images and for noise, each by itself.

One choice serves calls of any number of images, so weights are packed once and an image gives the same bits in any company: what a
layer costs is its share of the time of one image plus its share of the time of many.

Where products may be of bfloat16 or of integers, float32 is among the choices: Winograd's large tiles in float32 can be as fast as
small ones in bfloat16, the error that they save lets other layers have larger tiles in bfloat16, and rounding to integers does not
pay where channels are few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repvgg_engine import reference
from repvgg_engine.costs import Size, estimated_cost, macs, output_size
from repvgg_engine.layers import Array, Conv, Layer, Pool
from repvgg_engine.machine import one_blas_thread
from repvgg_engine.net import Net

VERSION = 5
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
# The error that an algorithm adds in a layer, as a multiple of the direct one's: a property of its matrices, the same within 5% in
# float32 and in bfloat16, with AVX-512, AVX2 and SSE2, for 192 channels and for 512. The check in the end does not rest on it.
GROWTH = {"direct": 1.0, "F2": 1.7, "F4": 4.9, "F5": 9.6, "F6": 20.5, "F7": 49.0}
# An error is watched through the net in one layer computed by the first of these that it has: large enough to show.
WATCHED = ("F5", "F4", "F2")
# Of each kind of calibration images. They have at most so many MACs in all, where that leaves the least side.
CALIBRATION_IMAGES, MOST_CALIBRATION_MACS, LEAST_SIDE = 4, 6e9, 56
# Images that are timed at a time have at most so many MACs each, where that leaves the least side; many: enough for every thread.
MOST_TIMED_MACS, MANY = 6e9, 4
# The least of so many runs counts, of one image and of many; of each layer's first algorithm, the direct one, of one alone: it
# takes as long as the others together, and is rarely the best where there are others.
REPEATS_OF_ONE, REPEATS, REPEATS_OF_DIRECT = 4, 2, 1
# Worth timing: no algorithm that is guessed to take so many times longer than a more accurate one.
HOPELESS = 1.15

Squares = NDArray[np.float64]  # of errors, for each kind of images


@dataclass(frozen=True)
class Option:
    """A layer by one algorithm: its share of the time of a call, what it adds to the square of the output's error on each kind of
    images, bytes of weights."""

    algorithm: str
    seconds: float
    error: Squares
    bytes: int


Shares = list[dict[str, float]]  # of each layer by each algorithm: of the time of one image, plus of the time of many
Say = Callable[[str], None]


def silent(step: str) -> None:
    """Say nothing."""


def measure_speed(net: Net, memory_limit: int, say: Say = silent) -> Shares:
    """Return what the algorithms that may pay cost each layer: the same for every accuracy."""
    return _shares(net, [worth_timing(net, i, size, memory_limit) for i, size in enumerate(_sizes(net, _input_size(net)))], say)


def choose_algorithms(net: Net, accuracy: str, memory_limit: int, seconds: Shares, say: Say = silent) -> list[str]:
    """Return an algorithm for each layer, "" for those that are no convolutions, and have the net run by them.

    seconds: of `measure_speed`. say: is told what is at hand.
    """
    contenders = [list(of_layer) for of_layer in seconds]
    say("the reference in float64")
    with one_blas_thread():
        errors = _Errors(net, calibration_images(net), accuracy)
    added = errors.added(contenders, say)
    options = [
        [Option(name, seconds[i][name], added[i][name], net.weight_bytes(i, name)) for name in names]
        for i, names in enumerate(contenders)
    ]
    left = 1 - errors.of(errors.exact)
    for attempt in range(8):
        say(f"checking the whole net, {attempt + 1}")
        names = choose(options, left, memory_limit)
        worst = errors.of(names).max()
        if worst <= 1:
            return names
        left *= min(0.9, 0.95 / worst)
    net.choose_all(errors.direct)
    return errors.direct


def worth_timing(net: Net, index: int, size: Size, memory_limit: int) -> list[str]:
    """Return the algorithms of a layer that may be the best for one image or for many, the most accurate first."""
    layer, known = net.layers[index], net.known[index]
    if not isinstance(layer, Conv):
        return []
    kept: list[str] = []
    best = {1: float("inf"), MANY: float("inf")}
    for name in known:
        if name.split()[0] == "direct":  # each precision as a start of its own
            best = dict.fromkeys(best, float("inf"))
        costs = {n: estimated_cost(layer, size, name, n, net.isa) for n in best}
        fits = net.weight_bytes(index, name) <= memory_limit / 2
        if name in (known[0], "direct") or (fits and any(costs[n] < HOPELESS * best[n] for n in best)):
            kept.append(name)
            best = {n: min(best[n], costs[n]) for n in best}
    return kept


class _Errors:
    """Squares of the output's error on each kind of images, 1 being what is allowed."""

    def __init__(self, net: Net, images: Array, accuracy: str) -> None:
        self.net = net
        self.direct = [names[0] if names else "" for names in net.known]
        self.exact = ["direct" if name else "" for name in self.direct]  # in float32
        self.kinds = np.split(images, len(images) // CALIBRATION_IMAGES)
        self.wanted = np.split(reference.run(net.layers, images), len(self.kinds))
        self.allowed = np.ones(len(self.kinds))
        least = FAST**2 if (net.precision, accuracy) == ("fp32", "fast") else 0.0
        self.allowed = np.maximum(TIMES_DIRECT[net.precision, accuracy] ** 2 * self.of(self.direct), least)

    def of(self, names: Sequence[str]) -> Squares:
        """Return the error with these algorithms."""
        self.net.choose_all(names)
        pairs = zip(self.kinds, self.wanted, strict=True)
        return np.array([reference.error(self.net.run(kind), wanted) ** 2 for kind, wanted in pairs]) / self.allowed

    def added(self, contenders: Sequence[Sequence[str]], say: Say) -> list[dict[str, Squares]]:
        """Return what each algorithm adds in each layer, watched in the middle one of those that are alike."""
        base = self.of(self.exact)
        alike: dict[Any, list[int]] = {}
        for i, layer in enumerate(self.net.layers):
            if isinstance(layer, Conv):
                eight = tuple(name for name in contenders[i] if name.endswith(" int8"))
                alike.setdefault((_geometry(layer), eight), []).append(i)
        added: list[dict[str, Squares]] = [{} for _ in contenders]
        for kind, layers in enumerate(alike.values()):
            say(f"errors, {kind + 1} of {len(alike)} kinds of layers")
            watched = layers[len(layers) // 2]
            for ending in {name[len(name.split()[0]) :] for name in contenders[watched]}:  # "", and perhaps " bf16", ...
                if ending == " int8":  # each of them rounds in a way of its own
                    own = {name: self._watched(watched, name, base) for name in contenders[watched] if name.endswith(ending)}
                    for i in layers:
                        added[i] |= own
                    continue
                unit = self._unit(watched, ending, base)
                for i in layers:
                    for name in contenders[i]:
                        if name.removesuffix(ending) in GROWTH:
                            growth = GROWTH[name.removesuffix(ending)] ** 2
                            added[i][name] = unit * (growth - (ending == ""))
        return added

    def _unit(self, layer: int, ending: str, base: Squares) -> Squares:
        """Return what the direct algorithm of a layer adds, by an algorithm that adds more of it."""
        if ending == "" and self.net.precision != "fp32":
            return np.zeros_like(base)  # nothing beside the other precision's
        name = next((n for n in WATCHED if n + ending in self.net.known[layer]), "direct") + ending
        grown = GROWTH[name.removesuffix(ending)] ** 2 - (ending == "")
        return self._watched(layer, name, base) / grown if grown else np.zeros_like(base)

    def _watched(self, layer: int, name: str, base: Squares) -> Squares:
        """Return what one layer by that algorithm adds."""
        return np.maximum(self.of([*self.exact[:layer], name, *self.exact[layer + 1 :]]) - base, 0)


def calibration_images(net: Net) -> Array:
    """Return images of mean 0 and deviation 1, of the input size or less where float64 would take long.

    First smooth patterns, rather like photographs, then as many of pure noise, on which errors of the early layers weigh more.
    """
    size = _shrunk(net.layers, _input_size(net), MOST_CALIBRATION_MACS / (2 * CALIBRATION_IMAGES))
    random = np.random.default_rng(0)
    coarse = random.standard_normal((CALIBRATION_IMAGES, net.channels, 7, 7))
    at = [np.linspace(0, 6, n) for n in size]
    weights = [np.maximum(0, 1 - np.abs(a[:, None] - np.arange(7))) for a in at]  # linear interpolation
    smooth = np.einsum("yi,ncij,xj->ncyx", weights[0], coarse, weights[1])
    noise = random.standard_normal((2, *smooth.shape))
    return np.concatenate([smooth * 1.3 + noise[0] * 0.4, noise[1]]).astype(np.float32)


def _input_size(net: Net) -> Size:
    return (net.preprocessing.height, net.preprocessing.width) if net.preprocessing else (224, 224)


def _shrunk(layers: Sequence[Layer], size: Size, most_macs: float) -> Size:
    """Return a size with no more MACs than that, or about the least side."""
    while macs(layers, size) > most_macs and min(size) >= 2 * LEAST_SIDE:
        size = size[0] // 2, size[1] // 2
    return size


def _sizes(net: Net, size: Size) -> list[Size]:
    """Return the size of each layer's input."""
    sizes = []
    for layer in net.layers:
        sizes.append(size)
        size = (1, 1) if isinstance(layer, Pool) else output_size(layer, size) if isinstance(layer, Conv) else size
    return sizes


def _shares(net: Net, contenders: Sequence[Sequence[str]], say: Say) -> Shares:
    """Return, for each layer and contender, its share of the time of one image plus its share of the time of many."""
    layers, kind = one_of_each(net, contenders)
    size = _shrunk(layers, _input_size(net), MOST_TIMED_MACS)
    images = np.random.default_rng(0).standard_normal((MANY, net.channels, *size), np.float32)
    small = Net(layers, precision=net.precision, threads=net.threads, isa=net.isa)
    of_kind = [contenders[kind.index(k)] for k in range(len(layers))]
    shares: Shares = [dict.fromkeys(names, 0.0) for names in contenders]
    for seconds in _time(small, of_kind, images, say):
        whole = sum(min(seconds[k].values(), default=0.0) for k in kind)
        for i, k in enumerate(kind):
            for name in contenders[i]:
                shares[i][name] += seconds[k][name] / max(whole, 1e-12)
    return shares


def one_of_each(net: Net, contenders: Sequence[Sequence[str]]) -> tuple[list[Layer], list[int]]:
    """Return a shorter net, without the layers that are like one before and give what they take; and each layer's place in it."""
    kept: list[Layer] = []
    kind: list[int] = []
    seen: dict[Any, int] = {}
    for layer, size, names in zip(net.layers, _sizes(net, _input_size(net)), contenders, strict=True):
        key = (size, tuple(names), *_geometry(layer)) if isinstance(layer, Conv) else None
        same = isinstance(layer, Conv) and layer.in_channels == layer.out_channels and output_size(layer, size) == size
        if not same or key not in seen or not _writes_bytes(kept[-1]) >= _writes_bytes(layer):
            seen[key] = len(kept)
            kept.append(layer)
            kind.append(len(kept) - 1)
        else:
            kind.append(seen[key])
    return kept, kind


def _writes_bytes(layer: Layer) -> bool:
    """Say whether what comes after a layer may read bytes of it, in int8."""
    return isinstance(layer, Conv) and layer.relu and layer.groups == 1


def _geometry(layer: Conv) -> tuple[Any, ...]:
    return layer.weight.shape, layer.stride, layer.dilation, layer.groups


def _time(net: Net, contenders: Sequence[Sequence[str]], images: Array, say: Say) -> list[Shares]:
    """Return, for one image and for all, the seconds of each layer by each contender: the least of a few runs."""
    seconds: list[Shares] = [[{} for _ in contenders] for _ in range(2)]
    turns = max(map(len, contenders))
    for turn in range(turns):
        say(f"speed, {turn + 1} of {turns} algorithms")
        names = [of_layer[min(turn, len(of_layer) - 1)] if of_layer else "" for of_layer in contenders]
        net.choose_all(names)
        for times, batch, repeats in zip(seconds, (images[:1], images), (REPEATS_OF_ONE, REPEATS), strict=True):
            for repeat in range((repeats if turn > 0 else REPEATS_OF_DIRECT) + 1):
                net.profile()
                net.run(batch)
                if repeat > 0:  # the first lays out memory and weights
                    for of_layer, name, taken in zip(times, names, net.profile(), strict=True):
                        of_layer[name] = min(of_layer.get(name, taken), taken)
    return seconds


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
                if saved <= 0 or (spent_error + np.maximum(more, 0) > error).any() or spent_memory + max(bigger, 0) > memory:
                    continue
                price = max(float((more / np.maximum(error, 1e-300)).max()), 0.0) + 0.1 * max(bigger, 0) / room
                worth = saved / max(price, 1e-12)
                if best is None or worth > best[0]:
                    best = worth, i, option
        if best is None:
            return [o.algorithm if o else "" for o in chosen]
        chosen[best[1]] = best[2]
