"""Random calls of random nets by several threads for as long as asked: the same answers all the time, and memory that stays flat.

python soak.py [--seconds 600] [--seed N]       # `make soak`
"""

import argparse
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from nets import images, model_file, plain_net
from repvgg_engine import Net, load

CALLERS, MOST_GROWTH = 3, 24 << 20
WARM = 100  # calls of each before memory is looked at, however busy the machine is
SIZES = ((32, 32), (16, 48), (33, 31), (64, 64), (7, 9), (40, 24))  # more than a net keeps plans for


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(seconds: float, seed: int, path: Path) -> tuple[int, int]:
    """Return how many calls were made, and bytes that the process has grown by since a quarter of them or of the time."""
    model_file(path, plain_net())
    exact = Net(plain_net(), threads=1)
    batches = [images(n, seed=n, size=size) for n in (1, 3, 8, 33) for size in SIZES]
    wanted = [exact(x) for x in batches]
    nets = [load(path, accuracy="exact", threads=threads) for threads in (1, 2, 3)]
    ends = time.monotonic() + seconds

    made = [0] * CALLERS

    def call(caller: int) -> None:
        choose = random.Random(f"{seed} {caller}")
        while time.monotonic() < ends or made[caller] < 4 * WARM:
            kind, i = choose.random(), choose.randrange(len(batches))
            if kind < 0.02:
                nets[choose.randrange(len(nets))] = load(path, accuracy="exact", threads=choose.randint(1, 4))
            net = choose.choice(nets)
            if kind > 0.95:
                net.choose(1, choose.choice(("F2", "F4", "direct")))
            assert np.allclose(net(batches[i]), wanted[i], rtol=1e-3, atol=1e-3)
            made[caller] += 1

    with ThreadPoolExecutor(CALLERS) as pool:
        running = [pool.submit(call, caller) for caller in range(CALLERS)]
        time.sleep(seconds / 4)
        while min(made) < WARM and not any(caller.done() for caller in running):
            time.sleep(0.01)
        before = resident()
        for caller in running:
            caller.result()
    return sum(made), resident() - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    words = parser.parse_args()
    print(f"soak: {words.seconds:.0f} s, --seed {words.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        calls, growth = soak(words.seconds, words.seed, Path(folder) / "net.safetensors")
    print(f"soak: {calls} calls, {growth / 2**20:+.1f} MiB after the first quarter")
    raise SystemExit(growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
