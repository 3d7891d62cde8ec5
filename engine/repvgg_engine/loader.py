"""From a model file, or layers at hand, to a net that is ready to run: read, plan, build.

net = repvgg_engine.load("a0.safetensors")
plan = repvgg_engine.plan("a0.safetensors")
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from repvgg_engine import plans, speed, tune
from repvgg_engine.files import Preprocessing, read
from repvgg_engine.layers import Layer, Pool
from repvgg_engine.library import EngineError
from repvgg_engine.machine import available_memory, processor
from repvgg_engine.net import Net
from repvgg_engine.plans import Plan

ACCURACIES = ("exact", "high", "fast")
# Of the memory that this process may use, for packed weights.
MEMORY_SHARE = 1 / 8


def load(
    path: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    accuracy: str = "high",
    threads: int | None = None,
    pin: bool = False,
    features: bool = False,
    memory_limit: int | None = None,
    isa: str | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
) -> Net:
    """Return the net of a model file in deploy form.

    precision: fp32; bf16, whose products are of bfloat16 (AVX512-BF16); int16, whose products are of integers of 14 to 16 bits,
    on any processor and without calibration; int8, whose products are of bytes too, of a model that `repvgg quantize --to native`
    calibrated. accuracy: "exact" computes every convolution directly; "high" and "fast" let Winograd's algorithms in, as long as
    the output's error stays within what tune.py says; which is best for each layer is measured at the first call and kept on
    disk. threads: that compute, by default as many as this process may use processors. pin: each further thread to a processor of
    its own. features: the last feature map instead of logits. memory_limit: bytes for packed weights. isa: an instruction set, by
    default the best. plan: by which each layer is computed, or its file; precision, accuracy and isa are then the plan's.
    Raises `EngineError`.
    """
    model = read(Path(path))
    layers = model.layers
    if features:
        layers = layers[: next((i for i, layer in enumerate(layers) if isinstance(layer, Pool)), len(layers))]
    chosen = plans.read(plan) if isinstance(plan, str | os.PathLike) else plan
    if chosen and features:
        chosen = Plan(chosen.isa, chosen.precision, chosen.algorithms[: len(layers)])
    return build(layers, model.preprocessing, model.classes, precision, accuracy, threads, pin, memory_limit, isa, chosen)


def build(
    layers: Sequence[Layer],
    preprocessing: Preprocessing,
    classes: list[str] | None = None,
    precision: str = "fp32",
    accuracy: str = "high",
    threads: int | None = None,
    pin: bool = False,
    memory_limit: int | None = None,
    isa: str | None = None,
    plan: Plan | None = None,
) -> Net:
    """Return the net of layers that are at hand; arguments as those of `load`."""
    if accuracy not in ACCURACIES:
        raise EngineError(f"no accuracy {accuracy!r}: {', '.join(ACCURACIES)}")
    if memory_limit is not None and memory_limit < 1:
        raise EngineError(f"memory_limit is {memory_limit}: it is a number of bytes")
    net = Net(
        layers,
        precision=plan.precision if plan else precision,
        threads=threads,
        pin=pin,
        preprocessing=preprocessing,
        classes=classes,
        isa=plan.isa if plan else isa,
    )
    if plan:
        _apply(net, plan)
    elif accuracy != "exact":
        net.before_first_call = lambda net: _apply(net, _planned(net, accuracy, memory_limit))
    return net


def plan(
    path: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    accuracy: str = "high",
    threads: int | None = None,
    memory_limit: int | None = None,
    isa: str | None = None,
) -> Plan:
    """Return the plan of a model file for this machine, measured now or before; arguments as those of `load`."""
    net = load(path, precision=precision, accuracy=accuracy, threads=threads, memory_limit=memory_limit, isa=isa)
    net.prepare()
    return Plan(net.isa, net.precision, tuple(net.chosen))


def _planned(net: Net, accuracy: str, memory_limit: int | None) -> Plan:
    """Return the plan that is kept for this net on this machine, or else measure one and keep it.

    Speed is measured once for all accuracies.
    """
    limit = memory_limit or _rounded(int(MEMORY_SHARE * available_memory()))
    machine = [processor(), net.isa, net.threads]
    asked = [tune.VERSION, net.precision, limit]
    speeds, key = (_key(net, [machine, asked, what]) for what in ("speeds", accuracy))
    kept = plans.cached(key)
    if kept:
        with suppress(EngineError):
            plans.check(kept, net.known)
            return kept
    seconds = plans.cached_speeds(speeds, net.known)
    if seconds is None:
        seconds = speed.measure_speed(net, limit, _say)
        plans.keep_speeds(speeds, seconds)
    measured = Plan(net.isa, net.precision, tuple(tune.choose_algorithms(net, accuracy, limit, seconds, _say)))
    _say("")
    plans.keep(key, measured)
    return measured


def _rounded(limit: int) -> int:
    """Return the three leading bits of a limit: a machine that has a little less memory than yesterday, and no less than its plan
    was made for, keeps that plan."""
    low = max(0, limit.bit_length() - 3)
    return limit >> low << low


def _key(net: Net, words: list[object]) -> str:
    return hashlib.sha256(json.dumps(words).encode() + _fingerprint(net)).hexdigest()[:32]


def _say(step: str) -> None:
    """Tell who sits at a terminal what takes so long, on one line that goes when it is done."""
    if sys.stderr and not sys.stderr.closed and sys.stderr.isatty():  # a daemon's may be none
        line = f"repvgg_engine: choosing algorithms for this machine, once: {step}" if step else ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _apply(net: Net, plan: Plan) -> None:
    plans.check(plan, net.known)
    net.choose_all(plan.algorithms)


def _fingerprint(net: Net) -> bytes:
    """Tell nets apart: shapes, and samples of the weights."""
    digest = hashlib.sha256(repr(net.preprocessing).encode())
    for layer in net.layers:
        for value in vars(layer).values():
            is_array = isinstance(value, np.ndarray)
            digest.update(repr(value.shape if is_array else value).encode())
            if is_array:
                digest.update(value.reshape(-1)[:: 1 + value.size // 1024].tobytes())
    return digest.digest()
