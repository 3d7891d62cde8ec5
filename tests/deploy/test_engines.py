"""Every engine gives what PyTorch gives in float64, on random batch norm statistics."""

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import randomize, relative_error
from forks import Forks
from rounding import ENGINES as OTHERS
from rounding import rounding
from torch import Tensor, nn

from repvgg.deploy import engines
from repvgg.deploy.engines import ENGINES, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.fold.reparameterize import reparameterize
from repvgg.models.names import Member
from repvgg.models.repvgg import RepVGG

SIZE = (3, 32, 32)
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.bfloat16,
}  # int16 is at least as exact


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_ENGINE_CACHE", str(tmp_path))


COMPILED = ("compile", "aotinductor")  # which takes long; in eager mode every precision is tested
PAIRS = [
    pytest.param(name, precision, marks=[pytest.mark.slow] if name in COMPILED else [])
    for name, known in ENGINES.items()
    for precision in known.on_cpu
    if precision != "int8"  # of files that are calibrated: test_native_int8.py
]


@pytest.mark.parametrize("name", ["cudagraphs", "compile-max"])
def test_engines_of_cuda_are_not_offered_on_a_cpu(name: str, folded: nn.Module) -> None:
    assert name not in engines.installed("fp32")
    assert name in engines.installed("bf16", "cuda")
    with pytest.raises(ValueError, match=f"the engine {name} has no fp32 on cpu"):
        engines.build(name, folded, Options(SIZE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_gives_what_eager_gives(precision: str, folded: nn.Module, images: Tensor) -> None:
    options = Options(SIZE, len(images), precision, device="cuda")
    other = reparameterize(randomize(RepVGG(Member((1, 2, 1, 1), 0.25, 0.25, groups=2), 10)))
    recorded = [engines.build("cudagraphs", network, options) for network in (folded, other)]
    torch.cuda.empty_cache()
    filler = [torch.full((2**18,), torch.nan, device="cuda") for _ in range(64)]  # takes whatever memory was let go
    for graph, network in zip(recorded, (folded, other), strict=True):
        for batch in (images, images.flip(0)):  # the second is no echo of the first
            assert torch.equal(graph(batch), engines.build("eager", network, options)(batch))
    del filler


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.threads = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.threads.fill_(torch.get_num_threads())


def test_eager_computes_on_as_many_threads_as_it_was_told() -> None:
    before = torch.get_num_threads()
    for threads, wanted in ((1, 1), (2, 2), (None, before)):
        assert int(engines.build("eager", Counting(), Options(SIZE, 1, threads=threads))(torch.zeros(1, *SIZE))) == wanted
        assert torch.get_num_threads() == before


def test_a_graph_keeps_its_network_alive(monkeypatch: pytest.MonkeyPatch, folded: nn.Module, images: Tensor) -> None:
    """A graph knows addresses alone: weights that were let go would be somebody else's memory."""
    from repvgg.deploy.engines import cudagraphs

    copies: list[weakref.ref[nn.Module]] = []

    def place(model: nn.Module, options: Options) -> tuple[nn.Module, Any]:
        network = copy.deepcopy(model)
        copies.append(weakref.ref(network))
        return network, torch.clone

    monkeypatch.setattr(cudagraphs, "place", place)
    monkeypatch.setattr(torch, "cuda", MagicMock())  # records nothing
    engine = cudagraphs.build(folded, Options(SIZE, len(images), device="cuda"))
    gc.collect()
    assert copies[0]() is not None
    del engine
    gc.collect()
    assert copies[0]() is None


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ENGINES["aotinductor"].on_cuda)
def test_compiled_ahead_of_time_for_cuda(precision: str, folded: nn.Module, images: Tensor) -> None:
    options = Options(SIZE, len(images), precision, device="cuda")
    with torch.no_grad():
        wanted = copy.deepcopy(folded).double()(images.double())
    ours, eager = (engines.build(name, folded, options)(images) for name in ("aotinductor", "eager"))
    assert relative_error(ours, wanted) <= OTHERS * max(relative_error(eager, wanted), torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_the_most_thorough_mode_computes_the_same(folded: nn.Module, images: Tensor) -> None:
    """It runs on a CPU too, where it is not offered: it takes minutes there and gains little."""
    from repvgg.deploy.engines import compiled_max

    got = compiled_max.build(folded, Options(SIZE, len(images)))(images)
    assert relative_error(got, copy.deepcopy(folded).double()(images.double())) <= rounding(folded, images, times=OTHERS)


@pytest.fixture(scope="module")
def folded() -> nn.Module:
    return reparameterize(randomize(RepVGG(Member((1, 2, 1, 1), 0.25, 0.25, groups=2), 10)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))


def installed(name: str) -> None:
    for package in ENGINES[name].packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def native_has(precision: str) -> bool:
    from repvgg_engine import instruction_sets

    forced = os.environ.get("REPVGG_ENGINE_ISA", "avx512")
    return precision != "bf16" or ("bf16" in instruction_sets() and forced == "avx512")


@pytest.mark.parametrize(("name", "precision"), PAIRS, ids=str)
def test_logits(name: str, precision: str, folded: nn.Module, images: Tensor) -> None:
    installed(name)
    if name == "native" and not native_has(precision):
        pytest.skip(f"this processor has no {precision}")
    if (name, precision) == ("openvino", "bf16") and "ONEDNN_MAX_CPU_ISA" in os.environ:
        pytest.skip("OpenVINO asks the processor, not oneDNN, whether it has bf16")
    before = {key: (t.clone(), t.stride()) for key, t in folded.state_dict().items()}
    with torch.no_grad():
        wanted = copy.deepcopy(folded).double()(images.double())
    in_turn = copy.deepcopy(folded).to(PRECISIONS[precision])
    allowed = rounding(in_turn, images.to(PRECISIONS[precision]), times=OTHERS)
    engine = engines.build(name, folded, Options(SIZE, len(images), precision, threads=1))
    logits = engine(images)
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    assert relative_error(logits, wanted) <= allowed
    assert engine.batch_size == (4 if name in ("compile", "aotinductor", "openvino") else None)
    assert relative_error(engine.in_turns(images[:3], 2), wanted[:3]) <= allowed
    first = logits.clone()
    assert not torch.equal(engine(-images), logits)
    assert torch.equal(logits, first)  # a later run does not write into what an earlier one gave
    if engine.batch_size is not None:
        with pytest.raises(ValueError, match="built for batches of 4, not 3"):
            engine(images[:3])
    else:
        assert relative_error(engine(images[:3]), wanted[:3]) <= allowed
    assert all(torch.equal(t, before[key][0]) and t.stride() == before[key][1] for key, t in folded.state_dict().items())


def test_mnn_rounds_no_worse_than_others() -> None:
    """By its largest Winograd tiles it would, tenfold."""
    installed("mnn")
    convolutions = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    network = nn.Sequential(nn.Conv2d(3, 64, 1), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted = copy.deepcopy(network).double()(images.double())
    engine = engines.build("mnn", network, Options((3, 28, 28), 2, threads=1))
    assert relative_error(engine(images), wanted) <= rounding(network, images)


def test_contiguous_format(folded: nn.Module, images: Tensor) -> None:
    both = [engines.build("eager", folded, Options(SIZE, 4, channels_last=flag)) for flag in (True, False)]
    prepared = [engine.prepare(images) for engine in both]
    assert [p.is_contiguous(memory_format=torch.channels_last) for p in prepared] == [True, False]
    assert relative_error(both[1](images), both[0](images)) <= rounding(folded, images)


def test_models_of_one_class_beyond_the_compilers_usual_limit_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives up on the ninth network of a class, with a warning in its log, and runs it uncompiled."""
    from torch._dynamo.utils import counters

    compile: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile(model, **{**how, "backend": "eager"}))  # soon done
    counters.clear()
    x = torch.randn(1, 2)
    for depth in range(1, 11):
        network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth))).eval()
        engine = engines.build("compile", network, Options(channels_last=False))
        with torch.no_grad():
            assert relative_error(engine(x), network(x)) <= rounding(network, x)
    assert counters["stats"]["unique_graphs"] == 10


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no engine 'onnx': there are eager, compile, compile-max, cudagraphs, aotinductor, onnx"):
        engines.check("onnx", "fp32")
    with pytest.raises(ValueError, match=r"the engine openvino has no fp32 on cuda$|pip install"):
        engines.check("openvino", "fp32", "cuda")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(
            ValueError, match=rf"the engine {name} needs onnx, onnxscript, {name}: pip install onnx onnxscript {name}"
        ):
            engines.build(name, nn.Identity(), Options())
    with pytest.raises(ValueError, match=r"the engine native needs repvgg_engine: pip install \./engine, with a C"):
        engines.build("native", nn.Identity(), Options())
    engines.check("eager", "fp32")


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_a_model_that_cannot_be_exported() -> None:
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ValueError, match="Peeks cannot be exported as a graph") as error:
        engines.build("onnxruntime", Peeks().eval(), Options(SIZE))
    assert "\n" not in str(error.value)


@pytest.fixture
def _switches() -> Iterator[None]:
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, cublas.allow_tf32 = before


@pytest.mark.usefixtures("_switches")
def test_tf32_only_where_it_is_asked_for() -> None:
    """The switches are global, and can be set without a GPU: engines that take turns each find their own."""
    from repvgg.deploy.engines.eager import in_precision

    def switches(images: Tensor) -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    runs = {name: in_precision(switches, Options(precision=name, device="cuda")) for name in ("tf32", "fp32", "bf16")}
    for name in ("fp32", "tf32", "bf16", "tf32", "fp32"):
        assert runs[name](torch.zeros(1)) == (name == "tf32",) * 2


SIGNAL = """
import os, signal
from pathlib import Path
from repvgg.deploy.engines import Options, openvino
first, second = (openvino.open_file(Path("net.onnx").read_bytes(), Options((3, 32, 32))) for _ in range(2))
del first, second
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_survive_openvino(folded: nn.Module, forks: Forks, tmp_path: Path) -> None:
    """Two Cores that go in the order in which they came leave a signal no stack to be handled on."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    (tmp_path / "net.onnx").write_bytes(to_onnx(folded, Signature(SIZE)))
    with forks.start(SIGNAL, tmp_path) as process:
        done = process.wait()
    assert (done.code, done.out) == (0, "heard\n"), done.err
