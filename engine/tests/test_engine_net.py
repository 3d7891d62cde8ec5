"""Whole nets: any batch, size, thread and process."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("repvgg_engine", exc_type=ImportError)

import repvgg_engine
from nets import PREPROCESSING, conv, images, model_file, plain_net
from repvgg_engine import EngineError, Net, instruction_sets, load, reference
from repvgg_engine.layers import Conv, Layer, MaxPool, Pool, SqueezeExcite

# Times what float32's rounding alone does on this machine.
DIRECT, WINOGRAD = 4, 20


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def own_rounding(layers: list[Layer], x: np.ndarray) -> float:
    """What float32 does to the plain sums."""
    return relative(reference.run(layers, x, np.float32), reference.run(layers, x))


@pytest.mark.parametrize("isa", [name for name in instruction_sets() if name != "bf16"])
def test_all_operators(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_ISA", isa)
    layers = plain_net()
    x = images(5)
    assert relative(Net(layers)(x), reference.run(layers, x)) < DIRECT * own_rounding(layers, x)


@pytest.mark.parametrize("isa", [name for name in instruction_sets() if name != "bf16"])
def test_max_pools(isa: str) -> None:
    """As a VGG has them, and with padding, which counts as nothing; NaN stays."""
    random = np.random.default_rng(0)
    layers: list[Layer] = [conv(random, 3, 20, padding=(1, 1), relu=True), MaxPool(20, (2, 2), (2, 2))]
    layers += [conv(random, 20, 24), MaxPool(24, (3, 2), (2, 1), (1, 0)), conv(random, 24, 5, padding=(1, 1))]
    for threads, x in ((1, images(1)), (2, images(4, size=(17, 23)))):
        net = Net(layers, threads=threads, isa=isa)
        assert relative(net(x), reference.run(layers, x)) < DIRECT * own_rounding(layers, x)
    x[0, 0, 3, 3] = np.nan
    assert np.isnan(net(x)[0]).any()
    assert not np.isnan(net(x)[1:]).any()


def test_pools_in_pieces() -> None:
    """Of large maps, cut by channels: the bits stay the same."""
    random = np.random.default_rng(0)
    layers: list[Layer] = [conv(random, 3, 84, padding=(1, 1)), MaxPool(84, (3, 3), (2, 2), (1, 1)), Pool(84)]
    for n, size in ((1, (97, 98)), (3, (61, 64))):
        x = images(n, size=size)
        results = [Net(layers, threads=threads)(x) for threads in (1, 2, 7)]
        assert relative(results[0], reference.run(layers, x)) < DIRECT * own_rounding(layers, x)
        assert all(np.array_equal(result, results[0]) for result in results)


def test_the_gates_of_squeeze_excite() -> None:
    """From one end of float32 to the other."""
    b, channels = np.linspace(-86, 86, 64).astype(np.float32), 64
    b[:3] = -1000, 1000, np.nan
    same = Conv(np.eye(channels, dtype=np.float32)[..., None, None], np.zeros(channels, np.float32))
    none, hidden = np.zeros((1, channels), np.float32), np.zeros(1, np.float32)
    gates = Net([same, SqueezeExcite(none, hidden, none.T.copy(), b)])(np.ones((1, channels, 1, 1), np.float32))[0, :, 0, 0]
    with np.errstate(over="ignore"):
        wanted = 1 / (1 + np.exp(-b.astype(np.float64)))
    assert gates == pytest.approx(wanted, rel=2e-7, nan_ok=True)


def test_arrays_of_other_shapes_are_refused() -> None:
    """What they do not hold would be read from behind them."""
    weight, matrix, one = np.ones((8, 3, 3, 3), np.float32), np.ones((2, 8), np.float32), np.ones(1, np.float32)
    gates = SqueezeExcite(matrix, np.ones(2, np.float32), matrix.T.copy(), np.ones(8, np.float32))
    first = Conv(weight, np.ones(8, np.float32))
    cases: list[list[Layer]] = [[Conv(weight, one)]]
    cases += [
        [first, replace(gates, reduce_bias=one)],
        [first, replace(gates, expand=one)],
        [first, replace(gates, expand_bias=one)],
    ]
    for layers in cases:
        with pytest.raises(EngineError, match=r"have the shape .* where the layer needs"):
            Net(layers)


def test_feature_maps_of_any_size() -> None:
    layers = plain_net()[:6]
    net = Net(layers)
    for size in ((32, 32), (17, 40), (5, 3)):
        x = images(2, size=size)
        wanted = reference.run(layers, x)
        got = net(x)
        assert got.shape == wanted.shape
        assert relative(got, wanted) < DIRECT * own_rounding(layers, x)


def test_large_feature_maps() -> None:
    """They are written by several threads, in squares that do not divide them."""
    layers: list[Layer] = [conv(np.random.default_rng(0), 3, 43, padding=(1, 1))]
    for n in (1, 3):
        x = images(n, size=(67, 81))
        got = Net(layers, threads=3)(x)
        assert relative(got, reference.run(layers, x)) < DIRECT * own_rounding(layers, x)


def test_more_threads_than_panels() -> None:
    """Few tiles are shared out by panels and by tiles, and the bits stay the same."""
    layers: list[Layer] = [conv(np.random.default_rng(0), 32, 96, padding=(1, 1))]
    x = images(1, channels=32, size=(14, 14))
    for algorithm in ("direct", "F4", "F7"):
        results = []
        for threads in (1, 2, 7, 16):
            net = Net(layers, threads=threads)
            net.choose(0, algorithm)
            results.append(net(x))
        assert all(np.array_equal(result, results[0]) for result in results)


def test_an_image_gives_the_same_in_any_company() -> None:
    """Whatever the batch and the number of threads, each number is computed in one way."""
    layers = plain_net()
    x = images(41)
    alone = np.concatenate([Net(layers, threads=1)(x[i : i + 1]) for i in range(3)])
    for threads in (1, 2, 5):
        net = Net(layers, threads=threads)
        for n in (1, 2, 3, 4, 8, 41):
            assert np.array_equal(net(x[:n])[:3], alone[:n])


def test_bytes_with_the_files_own_mean_and_std(tmp_path: Path) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    raw = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    scaled = (raw / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
    net = load(path, accuracy="exact")
    floats = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2).astype(np.float32))
    assert relative(net(raw), net(floats)) < DIRECT * own_rounding(net.layers, floats)


def test_many_threads_call_one_net() -> None:
    layers = plain_net()
    net = Net(layers, threads=3)
    batches = [images(n, seed=n) for n in (1, 2, 5, 8)] * 8
    wanted = [Net(layers)(x) for x in batches]
    with ThreadPoolExecutor(6) as pool:
        for got, expected in zip(pool.map(net, batches), wanted, strict=True):
            assert np.array_equal(got, expected)


def test_choices_change_while_threads_run() -> None:
    layers = plain_net()
    net, x = Net(layers, threads=2), images(4)
    wanted = reference.run(layers, x)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(net, x) for _ in range(30)]
        for turn in range(30):
            net.choose(1, ("F4", "direct", "F2")[turn % 3])
        assert max(relative(run.result(), wanted) for run in runs) < WINOGRAD * own_rounding(layers, x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_runs_it_too() -> None:
    folders = [str(Path(__file__).parent), str(Path(repvgg_engine.__file__).parent.parent)]
    script = f"""
import os, sys
sys.path[:0] = {folders}
import numpy as np
from nets import images, plain_net
from repvgg_engine import Net
net, x = Net(plain_net(), threads=2), images(4)
wanted = net(x)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(net(x), wanted) else 1)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(net(x), wanted)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_is_forked_while_another_thread_is_in_its_first_call() -> None:
    """While algorithms are chosen, or weights are packed: the child has that thread's locks, and not the thread."""
    folders = [str(Path(__file__).parent), str(Path(repvgg_engine.__file__).parent.parent)]
    script = f"""
import os, signal, sys, threading, time
sys.path[:0] = {folders}
import numpy as np
from nets import conv, images
from repvgg_engine import Net
random, x, me = np.random.default_rng(0), images(1, channels=256, size=(8, 8)), os.getpid()
layers = [conv(random, 256, 256, padding=(1, 1)) for _ in range(6)]
def choose(net):
    choosing.set()
    while slow and os.getpid() == me:
        time.sleep(0.01)
for slow in (True, False):
    nets = [Net(layers, threads=2) for _ in range(1 if slow else 4)]
    for wait, net in enumerate(nets):
        choosing = threading.Event()
        net.before_first_call = choose
        net.choose_all(["F7"] * len(layers))
        thread = threading.Thread(target=net, args=(x,), daemon=True)
        thread.start()
        choosing.wait()
        time.sleep(0.01 + 0.02 * wait)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # ends a child that hangs
            got = [net(x), net(x)]
            os._exit(0 if np.array_equal(*got) else 1)
        assert os.waitpid(child, 0)[1] == 0, (slow, wait)
        me = None if slow else me
        thread.join()
        me = os.getpid()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_python_exits_while_a_daemon_thread_is_in_a_call() -> None:
    """http.server's threads are such: the net must not go while they use it."""
    folders = [str(Path(__file__).parent), str(Path(repvgg_engine.__file__).parent.parent)]
    script = f"""
import sys, threading
sys.path[:0] = {folders}
from nets import images, plain_net
from repvgg_engine import Net
net, x, started = Net(plain_net(), threads=2), images(2, size=(128, 128)), threading.Event()
def serve():
    while True:
        net(x)
        started.set()
for _ in range(3):
    threading.Thread(target=serve, daemon=True).start()
started.wait()
"""
    for _ in range(4):
        subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_pinned_threads() -> None:
    layers, x = plain_net(), images(4)
    assert np.array_equal(Net(layers, threads=3, pin=True)(x), Net(layers)(x))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_hundreds_of_loads_leak_nothing(tmp_path: Path) -> None:
    path = model_file(tmp_path / "net.safetensors", plain_net())
    x = images(1)

    def use(times: int) -> None:
        for _ in range(times):
            load(path, accuracy="exact", threads=2)(x)
        gc.collect()

    use(100)
    before = resident()
    use(300)
    assert resident() - before < 8 << 20  # a net takes more than half a megabyte


def test_images_that_do_not_fit() -> None:
    net = Net(plain_net())
    for bad, reason in [
        (images(1)[0], r"images are \[N, C, H, W\] with 3 channels, not of shape \[3, 32, 32\]"),
        (images(1, channels=4), "with 3 channels, not of shape"),
        (images(1).astype(np.float64), "not float64"),
        (np.zeros((0, 3, 32, 32), np.float32), "not of shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "this net has no mean and std"),
    ]:
        with pytest.raises(EngineError, match=reason):
            net(bad)
    with pytest.raises(EngineError, match="images of that size do not fit layer 0"):
        Net([conv(np.random.default_rng(0), 3, 4)])(images(1, size=(2, 9)))
    assert net(images(1)[:, :, ::-1, ::-1]).shape == (1, 10)  # of any layout


def test_nets_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    bad: list[tuple[list[Layer], str]] = [
        ([], "a net has layers"),
        ([Pool(3)], "the first is a convolution"),
        ([conv(random, 3, 4), conv(random, 5, 4)], "layer 1 does not fit"),
        ([conv(random, 3, 4), Pool(3)], "layer 1 does not fit"),
        ([conv(random, 3, 4, stride=(0, 1))], "layer 0 is a convolution that cannot be"),
        ([conv(random, 3, 4), MaxPool(4, (2, 2), (2, 0))], "layer 1 is a max-pool that cannot be"),
        ([conv(random, 3, 4), MaxPool(4, (2, 2), (2, 2), (2, 0))], "layer 1 is a max-pool that cannot be"),
    ]
    for layers, reason in bad:
        with pytest.raises(EngineError, match=reason):
            Net(layers)
    with pytest.raises(EngineError, match="threads is 0"):
        Net(plain_net(), threads=0)
    with pytest.raises(EngineError, match="no precision 'int4': fp32, bf16, int16"):
        Net(plain_net(), precision="int4")
    monkeypatch.setenv("REPVGG_ENGINE_ISA", "avx9")
    with pytest.raises(EngineError, match="instruction set avx9: this processor has "):
        Net(plain_net())
    monkeypatch.setenv("REPVGG_ENGINE_ISA", "portable")
    with pytest.raises(EngineError, match="bf16 needs a processor with AVX512-BF16"):
        Net(plain_net(), precision="bf16")
