"""Threads: one pool for all nets of a process, nobody waits for another's packing, and pieces of equal work."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from nets import conv, images, plain_net, work
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


SHIM = """
#include <stdlib.h>
extern void *__libc_malloc(size_t);
static __thread int left __attribute__((tls_model("initial-exec")));
void fail_once_after(int calls) { left = calls; }
void *malloc(size_t bytes) { return left && --left == 0 ? NULL : __libc_malloc(bytes); }
"""


def test_memory_may_fail_while_threads_are_made(tmp_path: Path) -> None:
    """At any of the allocations for a net with a pool of its own: fewer threads, or an error in words."""
    if shutil.which("cc") is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs a C compiler, and glibc")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "shim.c", "-o", tmp_path / "shim.so"], check=True)
    script = f"""
import ctypes, sys
sys.path[:0] = {FOLDERS}
from repvgg_engine.library import CONV, LIBRARY, ImagesStruct, LayerStruct, OptionsStruct
few = (ctypes.c_float * 64)()
layer = LayerStruct(op=CONV, in_channels=1, out_channels=1, groups=1, weight=ctypes.addressof(few), bias=ctypes.addressof(few))
layer.kernel[:] = layer.stride[:] = layer.dilation[:] = 1, 1
options, image, ran = OptionsStruct(8, 0, 0, b"portable"), ImagesStruct(ctypes.addressof(few), 0, 1, 1, 1), []
fail_once_after, said = ctypes.CDLL(None).fail_once_after, ctypes.create_string_buffer(500)
for calls in range(1, 100):
    net = LIBRARY.repvgg_create(layer, 1, options, said, 500)
    fail_once_after(calls)
    ran.append(LIBRARY.repvgg_run(net, image, few, said, 500) == 0)
    fail_once_after(0)
    assert ran[-1] or b"not enough memory" in said.value, said.value
    LIBRARY.repvgg_destroy(net)
assert ran[-1] and not all(ran)
"""
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


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
        pieces, busy = work(net, 0, 1, (14, 14)), [0] * threads
        for piece in pieces:  # each goes to the first thread that is free
            busy[busy.index(min(busy))] += piece
        assert sum(pieces) / max(busy) >= wanted, algorithm
    with pytest.raises(EngineError, match="layer 1 is no convolution"):
        work(net, 1, 1, (14, 14))
    with pytest.raises(EngineError, match="no images"):
        work(net, 0, 0, (14, 14))
