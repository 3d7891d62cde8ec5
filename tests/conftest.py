"""What the tests share: random networks that a fold can really break, and how far apart two outputs are."""

import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from filelock import FileLock
from forks import Forks
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
torch.set_num_threads(1)  # the same sums in the same order everywhere, and no waiting for a core that something else is using


# The same examples in every run, so that a failure is never somebody else's; and no verdict on speed.
settings.register_profile("repvgg", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repvgg")


ROOM = 3 << 30  # bytes: twice what all tests leave behind
_set_aside = 0  # so many modules were imported when that was done last


def pytest_configure(config: pytest.Config) -> None:
    """Put what tests write into memory, where there is enough of it: they wait for a disk thousands of times. And keep them out of
    the user's caches, which would make one run unlike another."""
    if "REPVGG_TEST_CACHE" not in os.environ:  # a worker of pytest-xdist has its parent's
        os.environ.setdefault("MPLCONFIGDIR", str(Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "matplotlib"))
        os.environ["REPVGG_TEST_CACHE"] = cache = tempfile.mkdtemp(prefix="repvgg-tests-")
        os.environ |= {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    try:
        memory = os.statvfs("/dev/shm")
    except OSError:
        return
    if memory.f_bavail * memory.f_frsize >= ROOM and not memory.f_flag & os.ST_NOEXEC and os.access("/dev/shm", os.W_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


def pytest_collection_finish() -> None:
    """What all tests have imported stays, so the garbage collector need not look through its millions of objects each time."""
    global _set_aside
    _set_aside = len(sys.modules)
    gc.set_threshold(50_000)  # networks are made by the thousand, and few are cycles
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """So does what one has imported when it needed it."""
    if len(sys.modules) > _set_aside + 100:
        pytest_collection_finish()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Networks that the tests of a file share are the same ones whatever ran before. (Session fixtures do not come by here.)"""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _short_ends() -> Iterator[None]:
    """Runs end at once: to draw, to ask git and to hand memory back takes longer than most of them. All three have own tests."""
    from repvgg.disk import write_text
    from repvgg.measure.machine import this_machine

    machine = functools.cache(this_machine)

    def record(path: Path, figures: dict[str, Any], device: str = "") -> None:
        write_text(path, json.dumps({**figures, "machine": machine(device)}, indent=2) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repvgg.train.session.draw_curve", lambda lines, path: path.touch())
        patch.setattr("repvgg.train.session.write_record", record)
        patch.setattr("repvgg.train.loop.kept_heap", contextlib.nullcontext)
        yield


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A command that is run in this process leaves its signal handlers to none of the next tests, or their worker processes.

    Those that a test starts hear a hangup under nohup too, which has it ignored.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@torch.no_grad()
def randomize(model: Model, shape: tuple[int, ...] = (8, 3, 64, 64), seed: int = 0) -> Model:
    """`model` in eval mode, with a random affine part and random running statistics in every batch norm.

    Freshly initialised batch norms are nearly the identity, and hide every mistake; wholly random ones blow a deep network up
    or make its output the same for every image. So the statistics are those of random images, and then perturbed; and biases are
    mostly positive, without which a network this deep amplifies its own rounding a hundredfold, folded or not.
    """
    random = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    norms: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5, generator=random).mul_(torch.randn(norm.weight.shape, generator=random).sign())
            norm.bias.normal_(0.5, 0.3, generator=random)
        norm.momentum = None  # the mean over batches: here, of the one that follows
    model.train()(torch.randn(shape, generator=random).to(like))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var += 0.1 * norm.running_var.mean()  # a channel that no image excites has no variance at all
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn(norm.running_var.shape, generator=random).to(like)
        norm.running_var *= torch.empty(norm.running_var.shape).uniform_(0.7, 1.4, generator=random).to(like)
    return model.eval()


@torch.no_grad()
def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@torch.no_grad()
def error_of_deviation(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| as a fraction of how much the outputs differ from image to image: a constant output hides nothing."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().std(0).mean())


@torch.no_grad()
def centred(model: Model, images: Tensor) -> Model:
    """`model` without what its logits of all these images have in common: a random network takes all for one class otherwise."""
    head: Any = model.get_submodule("head")
    head = getattr(head, "classifier", head)  # of a PSPNet
    head.bias -= model(images).transpose(0, 1).flatten(1).mean(1)
    return model


def varied(counts: Tensor) -> bool:
    """Whether predictions, counted by class, differ: where all are of one class, every network is right alike."""
    return int(counts.max()) < 0.9 * int(counts.sum())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` fills once in a run of the tests, whichever of pytest-xdist's processes asks first."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            unfinished = factory.mktemp(name)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


DEMO = """
from dataclasses import replace
from repvgg import cli, demo
recipe, timed = demo.get_recipe, demo.interleave
demo.get_recipe = lambda name: replace(recipe(name), epochs=4)
demo.interleave = lambda calls, **how: timed(calls, rounds=3, batches=2, warmup=1)
cli.main(["demo", "--out", {!r}])
"""


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """What `repvgg demo` leaves behind, of half its epochs and few rounds; run once. Not to be changed."""

    def demo(out: Path) -> None:
        with forks.start(DEMO.format(str(out)), out.parent) as process:
            ended = process.wait()
        assert ended.code == 0, ended.err

    return made_once(tmp_path_factory, "demo", demo)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Commands as processes that need not load PyTorch: forks of one that has it."""
    with Forks() as run:
        yield run


SERVER = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket in an object store of this machine, to which the environment points."""
    pytest.importorskip("moto")
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
            with pytest.MonkeyPatch.context() as patch:
                for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                    patch.setenv(name, "testing")
                patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
                patch.setenv("AWS_ENDPOINT_URL", url)
                urllib.request.urlopen(urllib.request.Request(f"{url}/photos", method="PUT"), timeout=60).close()
                yield "s3://photos"
        finally:
            process.kill()
