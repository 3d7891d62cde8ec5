"""Hostile layers, model files, plans and pictures through the C interface: an `EngineError` or an answer, never anything else.

python fuzz.py [--cases 1000] [--seed N]        # run by `make sanitize` in builds that watch memory; a seed repeats a run
"""

import argparse
import ctypes
import json
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from nets import OpenOptionsStruct, calibrated, images, model_file, plain_net
from repvgg_engine import EngineError, Plan, load
from repvgg_engine.library import (
    LIBRARY,
    DescriptionStruct,
    ImagesStruct,
    LayerStruct,
    Message,
    OptionsStruct,
)

ODD = (-(2**31), -1, 0, 1, 2, 3, 7, 16, 17, 255, 2**15, 46341, 2**16, 2**16 + 1, 2**20, 2**20 + 1, 2**31 - 1)
ODD_RANGES = (-1.0, 1e-30, 1e-15, 1e15, 1e30, float("inf"), float("nan"))
SMALL = (1, 1, 2, 3, 3, 5, 8, 16, 20)
MOST = 1 << 20  # floats of weights, and of maps, that are worth a run
NUMBERS = np.random.default_rng(0).standard_normal(MOST).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    words = parser.parse_args()
    print(f"fuzz: {words.cases} cases of each kind, --seed {words.seed}", flush=True)
    ran, prepared = fuzz_layers(words.cases, words.seed), fuzz_pictures(words.cases, words.seed)
    with tempfile.TemporaryDirectory() as folder:
        opened = fuzz_files(words.cases, words.seed, Path(folder))
        planned = fuzz_plans(words.cases, words.seed, Path(folder))
    print(f"fuzz: {ran} nets ran, {opened} files and {planned} plans opened, {prepared} pictures prepared, the others were refused")


def fuzz_layers(cases: int, seed: int) -> int:
    """Return how many nets of random layers could be run."""
    choose, ran = random.Random(seed), 0
    for _ in range(cases):
        odds = choose.choice((0, 0, 0.02, 0.1))
        with suppress(EngineError):
            ran += _one_net(choose, odds)
    return ran


def fuzz_files(cases: int, seed: int, folder: Path) -> int:
    """Return how many damaged model files could still be opened and run."""
    choose, opened, path = random.Random(seed), 0, model_file(folder / "net.safetensors", calibrated(plain_net()))
    whole = path.read_bytes()
    for _ in range(cases):
        path.write_bytes(_damaged(whole, choose))
        with suppress(EngineError):
            load(path, precision=choose.choice(("fp32", "int8")), accuracy="exact", threads=2)(
                images(1, size=(choose.choice((8, 32)), 16))
            )
            opened += 1
    return opened


def fuzz_plans(cases: int, seed: int, folder: Path) -> int:
    """Return how many damaged plans could still be followed."""
    choose, opened, path = random.Random(seed), 0, model_file(folder / "net.safetensors", plain_net())
    net = load(path, accuracy="exact", threads=1)
    whole = json.loads(Plan(net.isa, "fp32", tuple(net.chosen)).to_json())
    names = ("F2", "F4", "F7", "direct", "direct bf16", "F2 bf16", "", "F3", "\n", "\u2028" * 300, *ODD)
    for _ in range(cases):
        plan = {**whole, "algorithms": [choose.choice(names[:3]) if choose.random() < 0.2 else n for n in whole["algorithms"]]}
        if choose.random() < 0.5:
            plan[choose.choice(list(plan))] = choose.choice((*names, [], {}, None, [whole["algorithms"]] * 2, 1.5))
        raw = bytearray(json.dumps(plan).encode())
        if choose.random() < 0.3:
            raw[choose.randrange(len(raw))] = choose.randrange(1, 256)
        message, options = Message(), OpenOptionsStruct(ctypes.sizeof(OpenOptionsStruct), None, bytes(raw), threads=1)
        with suppress(EngineError):
            LIBRARY.repvgg_destroy(message.check(LIBRARY.repvgg_open(str(path).encode(), options, *message.room)))
            opened += 1
    return opened


def fuzz_pictures(cases: int, seed: int) -> int:
    """Return how many pictures of odd sizes could be prepared, by descriptions with odd numbers."""
    choose, prepared, size = random.Random(seed), 0, ctypes.sizeof(DescriptionStruct)
    pixels, out = NUMBERS.view(np.uint8), np.empty(NUMBERS.nbytes, np.uint8)
    for _ in range(cases):
        odds = choose.choice((0, 0, 0.05, 0.3))
        height, width, channels, *of_input = (
            choose.choice(ODD) if choose.random() < odds else choose.choice(usual)
            for usual in ((1, 2, 9, 40, 333), (1, 3, 16, 70, 500), (1, 3, 3, 4), (1, 8, 33, 224), (1, 8, 32, 200), (1, 9, 32, 256))
        )
        rows, columns, resize = of_input
        about = DescriptionStruct(size, channels=channels, height=rows, width=columns, resize=resize)
        about.size = choose.choice((0, 7, 8, size - 16, 5000)) if choose.random() < odds else size
        about.interpolation = choose.choice((b"nearest", b"bilinear", b"bicubic", *((b"lanczos", b"", None) if odds else ())))
        refused = min(height, width) < 1 or height * width > 10**8 or not all(1 <= n <= 8192 for n in (channels, *of_input))
        if not refused and max(height * width, rows * columns) * channels > out.size:
            continue  # it would read or write more than there is
        message = Message()
        with suppress(EngineError):
            message.check(LIBRARY.repvgg_prepare(about, pixels.ctypes.data, height, width, out.ctypes.data, *message.room))
            prepared += 1
    return prepared


def _one_net(choose: random.Random, odds: float) -> bool:
    def number(*usual: int) -> int:
        return choose.choice(ODD) if choose.random() < odds else choose.choice(usual)

    structs = (LayerStruct * choose.randint(1, 4))()
    channels = number(*SMALL)
    for struct in structs:
        struct.op, struct.in_channels, struct.out_channels = number(0, 0, 0, 0, 1, 2, 3), number(channels), number(*SMALL)
        struct.groups, struct.relu = number(1, 1, 1, channels), number(0, 1)
        struct.kernel[:], struct.stride[:] = [number(1, 3, 3, 3)] * 2, [number(1, 1, 2)] * 2
        struct.largest_input = choose.choice(ODD_RANGES if choose.random() < odds / 4 else (0.0, 1.0, 1.0, 2.5))
        struct.padding[:], struct.dilation[:] = [number(0, 1, 1)] * 2, [number(1, 1, 2)] * 2
        for name in ("weight", "bias", "weight2", "bias2"):
            setattr(struct, name, None if choose.random() < odds / 8 else NUMBERS.ctypes.data)
        channels = struct.out_channels if struct.op == 0 else channels
    options = OptionsStruct(
        number(1, 2, 3) % 8, number(0, 1) % 2, number(0, 0, 0, 2, 3), choose.choice((None, b"portable", b"none"))
    )
    message = Message()
    net = LIBRARY.repvgg_create(structs, number(len(structs)) % (len(structs) + 1), options, *message.room)
    message.check(net)
    try:
        return _queries(choose, number, net, structs)
    finally:
        LIBRARY.repvgg_destroy(net)


def _queries(choose: random.Random, number: Any, net: int, structs: Any) -> bool:
    """Ask a net for all that it can tell, and run it where its sizes are small."""
    message, sizes = Message(), (number(1, 7, 16, 33), number(1, 9, 28))
    for layer in (number(*range(len(structs))), -1):
        for i in range(24):
            name = LIBRARY.repvgg_algorithm(net, layer, i)
            assert LIBRARY.repvgg_weight_bytes(net, layer, name) >= 0
    with suppress(EngineError):
        name = choose.choice((b"F2", b"F4", b"F7", b"direct", b"direct int8", b"F2 int8", b"", b"F3"))
        message.check(LIBRARY.repvgg_choose(net, number(*range(len(structs))), name, *message.room))
    shape, n = (ctypes.c_int32 * 3)(), choose.choice((1, 3, 5))
    message.check(LIBRARY.repvgg_output_shape(net, *sizes, shape, *message.room))
    weights = max(s.in_channels * s.out_channels * (s.kernel[0] * s.kernel[1] if s.op == 0 else 1) for s in structs)
    widest = max(max(s.in_channels, s.out_channels) * (1 + s.padding[0]) * (1 + s.padding[1]) for s in structs)
    if max(weights, n * widest * (sizes[0] + 64) * (sizes[1] + 64)) > MOST:
        return False
    output = np.empty(n * shape[0] * shape[1] * shape[2], np.float32)
    given = ImagesStruct(NUMBERS.ctypes.data, choose.choice((0, 0, 1)), n, *sizes)
    if choose.random() < 0.9:
        given.scale = given.shift = NUMBERS.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    message.check(LIBRARY.repvgg_run(net, given, output.ctypes.data, *message.room))
    return True


def _damaged(whole: bytes, choose: random.Random) -> bytes:
    """Flip bytes, cut the end, or put odd values in the header, which is what a forger would do."""
    raw, length = bytearray(whole), int.from_bytes(whole[:8], "little")
    kind = choose.randrange(4)
    if kind in (0, 3):
        for _ in range(choose.randint(1, 4)):
            raw[choose.randrange(8 + length if kind == 0 else len(raw))] = choose.randrange(256)
        return bytes(raw)
    if kind == 1:
        return bytes(raw[: choose.randrange(len(raw))])
    header = json.loads(whole[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["repvgg"])
    spot: Any = choose.choice([header, manifest, manifest["preprocessing"], *manifest["layers"], *manifest["layers"]])
    for _ in range(choose.randint(1, 2)):
        key = choose.choice(list(spot))
        spot[key] = choose.choice((*ODD, None, 0.5, 1e300, "", "l0.weight", [], {}, [3, 3], [2**40] * 4, [[]] * 3, spot.get(key)))
    if spot is not header:
        header["__metadata__"]["repvgg"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


if __name__ == "__main__":
    main()
