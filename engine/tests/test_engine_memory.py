"""Memory at its peak, measured in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from nets import conv, model_file, plain_net
from repvgg_engine import load, machine

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")

HEAD = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(repvgg_engine.__file__).parent.parent)]}
from pathlib import Path
import numpy as np
from nets import conv, images
from repvgg_engine import Net
from repvgg_engine.layers import Pool
random, same = np.random.default_rng(0), dict(padding=(1, 1), relu=True)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
def net_of(channels, depth):
    body = [conv(random, channels, channels, **same) for _ in range(depth)]
    net = Net([conv(random, 3, channels, **same), *body, Pool(channels)], threads=2)
    for i in range(1, depth + 1):
        net.choose(i, "F4")
    return net
"""


def measured(script: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", HEAD + script], capture_output=True, text=True, check=True)
    return list(map(int, done.stdout.split()))


def test_many_images_take_no_more_than_some() -> None:
    """A batch is taken in parts."""
    before, after, of_an_image = measured("""
net, x = net_of(192, 3), images(64, size=(14, 14)) + 0
net(x[:16])
before = peak()
net(x)
print(before, peak(), 192 * 14 * 14 * 4)
""")
    assert after - before < 16 * of_an_image  # 48 images more, a map of each: three times as much


def test_sizes_share_the_weights() -> None:
    """Each has a plan of its own, of maps alone."""
    before, after, weights = measured("""
net = net_of(256, 4)
net(images(1, size=(8, 8)))
before = peak()
for n in (1, 2, 3, 4):
    for side in (8, 9, 12):
        net(images(n, size=(side, side)))
print(before, peak(), sum(net.weight_bytes(i, "F4") for i in range(1, 5)))
""")
    assert after - before < weights / 2


def test_the_limit_follows_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group allows little memory, weights take an eighth of that."""
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path / "cache"))
    path = model_file(tmp_path / "net.safetensors", plain_net())
    exact = load(path, accuracy="exact")
    least = sum(exact.weight_bytes(i, "direct") for i in range(len(exact.layers)))
    for name, text in (("proc/self/cgroup", "0::/box\n"), ("sys/fs/cgroup/box/memory.max", str(8 * least + 8))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    net = load(path)
    net.prepare()
    assert sum(net.weight_bytes(i, name) for i, name in enumerate(net.chosen) if name) <= least


def test_the_words_for_too_little_memory(tmp_path: Path) -> None:
    """A net may be too large where no image has been seen; and where there is no memory for a path, there is a number still."""
    script = f"""
import ctypes, json, resource
from repvgg_engine.library import CONV, LIBRARY, EngineError, LayerStruct, Message, OptionsStruct
COUNT = 1 << 20
few = np.zeros(COUNT, np.float32)  # each group's bias takes a whole vector, of 4 to 16 numbers
layers = (LayerStruct * 64)()
for layer in layers:
    layer.op, layer.in_channels, layer.out_channels, layer.groups = CONV, COUNT, COUNT, COUNT
    layer.kernel[:] = layer.stride[:] = layer.dilation[:] = 1, 1
    layer.weight = layer.bias = few.ctypes.data
path = b"x" * (150 << 20)  # a copy of it does not fit
used = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (140 << 20), -1))
def said(call):
    message = Message()
    try:
        message.check(call(message.room))
    except EngineError as error:
        return str(error)
print(json.dumps([
    said(lambda room: LIBRARY.repvgg_create(layers, len(layers), OptionsStruct(1, 0, 0, b"portable"), *room)),
    said(lambda room: LIBRARY.repvgg_open({str(tmp_path / "net.safetensors")!r}.encode(), None, *room)),
]))
print(LIBRARY.repvgg_available_threads(path), LIBRARY.repvgg_available_memory(path))
"""
    random = np.random.default_rng(0)
    wide = conv(random, 4, 1 << 20, kernel=1, groups=4)
    narrow = conv(random, 1 << 20, 1 << 20, kernel=1, groups=1 << 20)
    model_file(tmp_path / "net.safetensors", [conv(random, 3, 4, kernel=1), wide, *([narrow] * 8)])
    done = subprocess.run([sys.executable, "-c", HEAD + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words, numbers = done.stdout.splitlines()
    wanted = ["a net of these layers", "a net of that model"]
    assert json.loads(words) == [f"there is not enough memory for {what}" for what in wanted]
    assert numbers == "1 0"
