"""Threads: one pool for all nets of a process, nobody waits for another's packing, and pieces of equal work."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from nets import conv, images, plain_net
from repvgg_engine import EngineError, Net, instruction_sets

FOLDERS = [str(Path(__file__).parent), str(Path(repvgg_engine.__file__).parent.parent)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_nets_share_their_threads() -> None:
    """Those of as many threads; they go with the last of them."""
    script = f"""
import os, sys, threading, time
sys.path[:0] = {FOLDERS}
from nets import images, plain_net
from repvgg_engine import EngineError, Net, instruction_sets
def threads():
    time.sleep(0.1)  # one that has ended is listed for a moment longer
    return len(os.listdir("/proc/self/task"))
first = threading.Thread(target=int)  # with which a sanitizer starts one of its own
first.start()
first.join()
x, before, counts = images(2), threads(), []
nets = [Net(plain_net(), threads=n) for n in (4, 4, 4, 2)]
for net in nets:
    net(x)
    counts.append(threads() - before)
del net, nets[1:]
nets[0](x)
counts.append(threads() - before)
del nets
counts.append(threads() - before)
print(counts)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[3, 3, 3, 4, 3, 0]"


def test_packing_holds_up_nobody() -> None:
    """While one call packs large weights, another net on the same threads runs, and this one's layers can be chosen."""
    random, x, small = np.random.default_rng(0), images(1, channels=512, size=(4, 4)), images(1)
    layers = [conv(random, 512, 512, padding=(1, 1)) for _ in range(6)]
    other = Net(plain_net(), threads=2)
    wanted = other(small)
    for _ in range(5):  # what is about to end may end before the others began
        net = Net(layers, threads=2)
        net.choose_all(["F7"] * len(layers))
        thread = threading.Thread(target=net, args=(x,))
        began = time.process_time()
        thread.start()
        while time.process_time() - began < 0.02 and thread.is_alive():  # so it is packing: nothing else takes that long
            time.sleep(0.001)
        got = other(small)
        net.choose(0, "F4")
        in_time = thread.is_alive()
        thread.join()
        assert np.array_equal(got, wanted)
        if in_time:
            return
    raise AssertionError("the others waited until all was packed")


@pytest.mark.parametrize("isa", [name for name in instruction_sets() if name != "bf16"])
@pytest.mark.parametrize(("threads", "wanted"), [(2, 1.9), (8, 7.5), (16, 13)])
def test_many_threads_have_equal_work(isa: str, threads: int, wanted: float) -> None:
    """Of a layer of 14 pixels and 192 channels, one image: how much faster so many threads would be if memory took no time."""
    net = Net([conv(np.random.default_rng(0), 192, 192, padding=(1, 1))], threads=threads, isa=isa)
    for algorithm in ("direct", "F2", "F4", "F7"):  # not F5, whose 9 tiles cannot be cut so: 7.2 and 12
        net.choose(0, algorithm)
        work, busy = net.work(0, 1, (14, 14)), [0] * threads
        for piece in work:  # each goes to the first thread that is free
            busy[busy.index(min(busy))] += piece
        assert sum(work) / max(busy) >= wanted, algorithm
    with pytest.raises(EngineError, match="layer 1 is no convolution"):
        net.work(1, 1, (14, 14))
    with pytest.raises(EngineError, match="no images"):
        net.work(0, 0, (14, 14))
