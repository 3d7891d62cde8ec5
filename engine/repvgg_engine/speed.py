"""What each algorithm costs each layer of a net: guessed by counting (costs.py), then measured, the likeliest first, while there is
time.

The layers are timed in a shorter net that has each kind of layer once, on one image and on a few. An algorithm that there was no
time for counts as guessed, relative to those of its layer that were timed. So a first call never waits long: what is measured less
is chosen by the guess.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repvgg_engine.costs import Size, estimated_cost, macs, output_size
from repvgg_engine.layers import Array, Conv, Layer
from repvgg_engine.machine import available_threads
from repvgg_engine.net import Net

# For all of it; what a turn that has begun still takes comes on top. And at most so many times that by the clock on the wall.
SECONDS, WALL_TIMES = 0.8, 4
# Images that are timed at a time have at most so many MACs each, where that leaves the least side; many: enough for every thread.
MOST_TIMED_MACS, MANY, LEAST_SIDE = 6e9, 4, 56
# No map of an image has more numbers than this, where that leaves something: a file of a few bytes may name images of any size.
MOST_NUMBERS = 1 << 22
# The least of so many runs counts, of one image and of many.
REPEATS_OF_ONE, REPEATS = 4, 2
# Worth timing: no algorithm that is guessed to take so many times longer than a more accurate one.
HOPELESS = 1.15

Shares = list[dict[str, float]]  # of each layer by each algorithm: of the time of one image, plus of the time of many
Say = Callable[[str], None]


class Clock:
    """Tells whether there is time left: of this process's own, so that others that compute too do not make choices worse; and no
    more than some times as much by the clock on the wall, for where threads wait for each other."""

    def __init__(self, seconds: float, threads: int) -> None:
        self.threads = min(threads, available_threads())  # more of them compute no faster
        self.end, self.wall_end = self.now() + seconds, time.monotonic() + WALL_TIMES * seconds

    def now(self) -> float:
        """Return seconds as they would pass if all threads had worked all the time."""
        return time.process_time() / self.threads

    def has(self, seconds: float = 0) -> bool:
        """Tell whether so many are left."""
        return self.now() + seconds < self.end and time.monotonic() < self.wall_end


def silent(step: str) -> None:
    """Say nothing."""


def measure_speed(net: Net, memory_limit: int, say: Say = silent) -> Shares:
    """Return what the algorithms that may pay cost each layer: the same for every accuracy."""
    clock, sizes = Clock(SECONDS, net.threads), sizes_of_layers(net.layers, input_size(net))
    contenders = [worth_timing(net, i, size, memory_limit) for i, size in enumerate(sizes)]
    layers, kind = one_of_each(net, contenders)
    of_kind = [kind.index(k) for k in range(len(layers))]  # a layer of each
    small = Net(layers, precision=net.precision, threads=net.threads, isa=net.isa)
    images = np.random.default_rng(0).standard_normal(
        (MANY, net.channels, *shrunk(layers, input_size(net), MOST_TIMED_MACS)), np.float32
    )
    ranked = [_ranked(net, i, sizes[i], contenders[i]) for i in of_kind]
    shares: Shares = [dict.fromkeys(names, 0.0) for names in contenders]
    for images_at_a_time, timed in zip((1, MANY), _time(small, ranked, images, clock, say), strict=True):
        seconds = [_completed(net, i, sizes[i], contenders[i], timed[k], images_at_a_time) for k, i in enumerate(of_kind)]
        whole = sum(min(seconds[k].values(), default=0.0) for k in kind)
        for i, k in enumerate(kind):
            for name in contenders[i]:
                if name in seconds[k]:
                    shares[i][name] += seconds[k][name] / max(whole, 1e-12)
                else:
                    shares[i].pop(name, None)
    return shares


def worth_timing(net: Net, index: int, size: Size, memory_limit: int) -> list[str]:
    """Return the algorithms of a layer that may be the best for one image or for many, the most accurate first."""
    layer, known = net.layers[index], net.known[index]
    if not isinstance(layer, Conv):
        return []
    kept: list[str] = []
    best_of: dict[str, dict[int, float]] = {}  # of each precision
    for name in known:
        best = best_of.get(ending_of(name), dict.fromkeys((1, MANY), float("inf")))
        costs = {n: estimated_cost(layer, size, name, n, net.isa) for n in best}
        fits = net.weight_bytes(index, name) <= memory_limit / 2
        if name in (known[0], "direct") or (fits and any(costs[n] < HOPELESS * best[n] for n in best)):
            kept.append(name)
            best_of[ending_of(name)] = {n: min(best[n], costs[n]) for n in best}
    return kept


def ending_of(name: str) -> str:
    """Return "", " bf16", " int16", ...: guesses are compared within a precision."""
    return name[len(name.split()[0]) :]


def _ranked(net: Net, index: int, size: Size, contenders: Sequence[str]) -> list[str]:
    """Return the contenders, the likeliest to be chosen first, those of each precision in turns."""

    def guess(name: str) -> float:
        layer = net.layers[index]
        assert isinstance(layer, Conv)
        return MANY * estimated_cost(layer, size, name, 1, net.isa) + estimated_cost(layer, size, name, MANY, net.isa)

    endings = list(dict.fromkeys(map(ending_of, contenders)))
    groups = [sorted((n for n in contenders if ending_of(n) == ending), key=guess) for ending in endings]
    turns = max(map(len, groups), default=0)
    return [group[turn] for turn in range(turns) for group in groups if turn < len(group)]


def _completed(
    net: Net, index: int, size: Size, contenders: Sequence[str], timed: dict[str, float], images: int
) -> dict[str, float]:
    """Return seconds of the contenders: where there was no time, the guess, relative to those of the precision that were timed; no
    seconds for a precision of which none was timed."""
    layer, seconds = net.layers[index], dict(timed)
    for name in contenders:
        alike = [other for other in timed if ending_of(other) == ending_of(name)]
        if name not in timed and alike:
            assert isinstance(layer, Conv)
            guesses = {n: estimated_cost(layer, size, n, images, net.isa) for n in (name, *alike)}
            seconds[name] = guesses[name] * sum(timed[n] for n in alike) / sum(guesses[n] for n in alike)
    return seconds


def one_of_each(net: Net, contenders: Sequence[Sequence[str]]) -> tuple[list[Layer], list[int]]:
    """Return a shorter net, without the layers that are like one before and give what they take; and each layer's place in it."""
    kept: list[Layer] = []
    kind: list[int] = []
    seen: dict[Any, int] = {}
    for layer, size, names in zip(net.layers, sizes_of_layers(net.layers, input_size(net)), contenders, strict=True):
        key = (size, tuple(names), *geometry(layer)) if isinstance(layer, Conv) else None
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


def _time(net: Net, ranked: Sequence[Sequence[str]], images: Array, clock: Clock, say: Say) -> list[Shares]:
    """Return, for one image and for all, the seconds of each layer by those that there was time for: the least of a few runs."""
    seconds: list[Shares] = [[{} for _ in ranked] for _ in range(2)]
    turns, turn_seconds = max(map(len, ranked)), 0.0
    for turn in range(turns):
        if turn > 0 and not clock.has(turn_seconds):
            break
        say(f"speed, {turn + 1} of {turns} algorithms")
        began = clock.now()
        names = [of_layer[min(turn, len(of_layer) - 1)] if of_layer else "" for of_layer in ranked]
        net.choose_all(names)
        for times, batch, repeats in zip(seconds, (images[:1], images), (REPEATS_OF_ONE, REPEATS), strict=True):
            for _ in range(repeats):
                net.profile()
                net.run(batch)
                for of_layer, name, taken in zip(times, names, net.profile(), strict=True):
                    if name:
                        of_layer[name] = min(of_layer.get(name, taken), taken)
        turn_seconds = clock.now() - began
    return seconds


def input_size(net: Net) -> Size:
    """Return the height and width of the images that a net is for."""
    return (net.preprocessing.height, net.preprocessing.width) if net.preprocessing else (224, 224)


def shrunk(layers: Sequence[Layer], size: Size, most_macs: float) -> Size:
    """Return a size with no more MACs than that, or about the least side, and of maps that are not too large; or the least that
    the layers take."""
    while True:
        half = max(1, size[0] // 2), max(1, size[1] // 2)
        too_long = macs(layers, size) > most_macs and min(half) >= LEAST_SIDE
        too_large = largest_map(layers, size) > MOST_NUMBERS and half != size
        if not (too_long or too_large):
            return size
        sizes = sizes_of_layers(layers, half)
        if any(min(s) < 1 for s in (*sizes, output_size(layers[-1], sizes[-1]))):
            return size
        size = half


def largest_map(layers: Sequence[Layer], size: Size) -> int:
    """Return how many numbers the largest map of an image has."""
    largest = 0
    for layer in layers:
        if isinstance(layer, Conv):
            largest = max(largest, layer.in_channels * size[0] * size[1])
            size = output_size(layer, size)
            largest = max(largest, layer.out_channels * size[0] * size[1])
        else:
            size = output_size(layer, size)
    return largest


def sizes_of_layers(layers: Sequence[Layer], size: Size) -> list[Size]:
    """Return the size of each layer's input."""
    sizes = []
    for layer in layers:
        sizes.append(size)
        size = output_size(layer, size)
    return sizes


def geometry(layer: Conv) -> tuple[Any, ...]:
    """Return what layers that are alike have in common."""
    return layer.weight.shape, layer.stride, layer.dilation, layer.groups
