"""The fastest engine on this machine that computes the same: measured once for a model, then remembered."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.parity import compare, reference
from repvgg.disk import Log, cache_folder, in_a_line, write_text
from repvgg.measure.machine import this_machine
from repvgg.measure.timing import interleave, synchroniser
from repvgg.terminal import live

# Compile for tens of seconds. On a CPU they are built where nothing else can be, or by name.
COMPILERS = ("compile", "compile-max", "aotinductor", "cudagraphs")
BUILDING, MEASURING = 8.0, 3.0  # seconds after which no other engine is built, and so many later no other round begun
# Rounds of the search, and how many times slower than the best an engine may be in them to go on to the next.
KNOCKOUT = ((1, 2.0), (5, 1.15), (15, 1.0))


def fastest(model: nn.Module, options: Options, log: Log = print, seconds: float = BUILDING) -> str:
    """Return the name of the engine that runs a folded model fastest, of those that are installed, have the precision and compute
    what PyTorch does in float64.

    Measured once for a model, its batch and this machine: the engines take turns. The figures are kept in ~/.cache/repvgg/engines.
    seconds: after which no other engine is built; those left out are told.
    """
    path = cache_folder() / "engines" / f"{_digest(model, options, seconds)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["fastest"])
    log("measuring the engines, once for this model on this machine")
    with live() as tell:
        found = measure(model, options, log, tell, seconds)
    best = next(iter(found))
    record = {"fastest": best, "engines": found, "options": asdict(options), "machine": this_machine(options.device)}
    text = json.dumps(record, indent=2)
    with suppress(OSError, ValueError):  # a cache that cannot be written costs time and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    log(f"{best}: {found[best]['images_per_second']:,.1f} images/s")
    return best


def measure(
    model: nn.Module, options: Options, log: Log = print, tell: Log = str, seconds: float = BUILDING
) -> dict[str, dict[str, float]]:
    """Return images a second and relative error of the engines that are right, the fastest first; each as in the last rounds that
    it took part in.

    tell: hears what is being built or timed. seconds: after which no other engine is built. Raises ValueError if none is right.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.randn(max(2, options.batch_size), *options.input_size, generator=random)
    wanted = reference(model, images[:2], options.precision)
    started = time.perf_counter()
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name in _in_order(engines.installed(options.precision, options.device, log)):
        if calls and (time.perf_counter() - started > seconds or (name in COMPILERS and options.device == "cpu")):
            log(f"left out: {name} (it would take long to build; name it to have it: --engine {name})")
            continue
        tell(f"building {name}")
        try:
            engine = engines.build(name, model, options)
            parity = compare(engine.in_turns(images[:2], options.batch_size), wanted)
        except (ValueError, RuntimeError) as error:
            log(f"left out: {name} ({in_a_line(error)})")
            continue
        if parity.ok:
            calls[name] = partial(engine.run, engine.prepare(images[: options.batch_size]))
            errors[name] = parity.error.relative
        else:
            log(f"left out: {name}, {parity}")
    if not calls:
        raise ValueError(f"no engine runs this model in {options.precision} and computes the same")
    figures: dict[str, dict[str, float]] = {}
    batches = 2
    for rounds, slower in KNOCKOUT:
        if figures and (len(calls) == 1 or time.perf_counter() - started > seconds + MEASURING):
            break
        tell(f"timing {', '.join(calls)}")
        timed = interleave(calls, rounds=rounds, batches=batches, warmup=1, synchronise=synchroniser(options.device))
        best = min(t.median for t in timed.values())
        for name in sorted(timed, key=lambda name: -timed[name].median):  # the fastest of the last rounds ends up as the last
            figures.pop(name, None)
            figures[name] = {"images_per_second": options.batch_size / timed[name].median, "max_rel_err": errors[name]}
        calls = {name: call for name, call in calls.items() if timed[name].median <= slower * best}
        batches = max(1, min(20, round(0.1 / best)))
    return dict(reversed(figures.items()))


def _in_order(names: Sequence[str]) -> list[str]:
    """Return the names: the likeliest first, lest the time is up before it, and those that compile for long at the end."""
    return sorted(names, key=lambda name: (name in COMPILERS, name != "native"))


def _digest(model: nn.Module, options: Options, seconds: float) -> str:
    """Return a digest of whatever the choice may depend on: the network and its weights, options, machine and versions."""
    machine = this_machine()
    facts = [
        asdict(options),
        seconds,
        {key: machine[key] for key in ("processor", "cores", "threads", "gpu", "versions")},
        str(model),
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
