"""engines/onnxruntime.py on a GPU that is not here: which providers it asks for, and that nothing else runs in their place."""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_error
from torch import nn

import repvgg
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.export import export
from repvgg.deploy.load import open_model
from repvgg.models.load import save

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


@pytest.fixture(scope="module")
def deploy() -> nn.Module:
    torch.manual_seed(0)
    return repvgg.reparameterize(randomize(repvgg.create_model("repvgg_micro", num_classes=3, width=0.25), (8, 3, 32, 32)))


@pytest.fixture(scope="module")
def file(deploy: nn.Module) -> bytes:
    module: Any = engines.runtime("onnxruntime")
    written: bytes = module.to_onnx(deploy, engines.Signature((3, 32, 32)))
    return written


@pytest.fixture
def _written_once(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine opens the same graph."""
    monkeypatch.setattr(engines.runtime("onnxruntime"), "to_onnx", lambda *_: file)


class Session:
    """What ONNX Runtime would be asked to open on a GPU; opened here on the CPU. starts: the providers that come up."""

    asked: list[tuple[str, dict[str, str]]] = []
    starts: tuple[str, ...] = (CUDA, TENSORRT)
    real = onnxruntime.InferenceSession

    def __init__(self, file: Any, settings: Any, providers: Any) -> None:
        type(self).asked = providers
        self.config = settings.get_session_config_entry("session.disable_cpu_ep_fallback")
        self.session = type(self).real(file, providers=[CPU])
        self.fallback = True

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.asked if name in self.starts] + [CPU]

    def disable_fallback(self) -> None:
        self.fallback = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


@pytest.mark.usefixtures("_written_once")
@pytest.mark.parametrize(
    ("precision", "here", "wanted"),
    [
        ("fp32", (CUDA, TENSORRT), {CUDA: {"device_id": "1", "use_tf32": "0"}}),
        ("tf32", (CUDA,), {CUDA: {"device_id": "1", "use_tf32": "1"}}),
        (
            "tf32",
            (CUDA, TENSORRT),
            {TENSORRT: {"device_id": "1", "trt_fp16_enable": "0"}, CUDA: {"device_id": "1", "use_tf32": "1"}},
        ),
        (
            "fp16",
            (CUDA, TENSORRT),
            {TENSORRT: {"device_id": "1", "trt_fp16_enable": "1"}, CUDA: {"device_id": "1", "use_tf32": "0"}},
        ),
    ],
)
def test_providers(precision: str, here: Any, wanted: Any, deploy: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*here, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    engine = engines.build("onnxruntime", deploy, Options((3, 32, 32), 2, precision, device="cuda:1"))
    assert dict(Session.asked) == wanted
    assert next(iter(wanted)) == Session.asked[0][0]
    with pytest.raises(RuntimeError):  # there is no GPU to put images on
        engine(torch.randn(2, 3, 32, 32))


@pytest.mark.usefixtures("_written_once")
def test_nothing_runs_on_the_cpu_instead(deploy: nn.Module, file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = engines.runtime("onnxruntime")
    options = Options((3, 32, 32), device="cuda")
    with pytest.raises(ValueError, match=r"needs its CUDAExecutionProvider for fp32 on cuda, and this one has .*onnxruntime-gpu"):
        engines.build("onnxruntime", deploy, options)
    with pytest.raises(ValueError, match="no bf16 on cuda: it has fp32, tf32, fp16"):
        engines.check("onnxruntime", "bf16", "cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(ValueError, match="ONNX Runtime c"):  # the real one: it warns, and has the CPU's alone
        engines.build("onnxruntime", deploy, options)
    with pytest.raises(ValueError, match="needs its TensorrtExecutionProvider for fp16"):
        engines.build("onnxruntime", deploy, Options((3, 32, 32), precision="fp16", device="cuda"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    session = module._session(file, options)
    assert (session.config, session.fallback) == ("1", False)
    monkeypatch.setattr(Session, "starts", ())
    with pytest.raises(engines.DeviceError, match="could not start its CUDAExecutionProvider"):
        engines.build("onnxruntime", deploy, options)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])  # listed without its libraries
    monkeypatch.setattr(Session, "starts", (CUDA,))
    module._session(file, Options((3, 32, 32), precision="tf32", device="cuda"))
    with pytest.raises(engines.DeviceError, match="could not start its TensorrtExecutionProvider"):
        module._session(file, Options((3, 32, 32), precision="fp16", device="cuda"))


def test_images_that_stay_on_the_device_give_the_same_logits(deploy: nn.Module, file: bytes) -> None:
    """The road of a GPU, on the CPU."""
    module: Any = engines.runtime("onnxruntime")
    session = module._session(file, Options((3, 32, 32)))
    images = torch.randn(2, 3, 32, 32)
    logits = module._on_device(session, "cpu", 0)(onnxruntime.OrtValue.ortvalue_from_numpy(images.numpy()))
    with torch.no_grad():
        assert relative_error(torch.from_numpy(logits.numpy()), deploy(images)) < 1e-4


def test_its_threads_sleep_once_a_run_is_over(deploy: nn.Module, file: bytes) -> None:
    """Those that spin, as ONNX Runtime's do by default, take the processors from whatever is timed next."""
    module: Any = engines.runtime("onnxruntime")
    engine = module.open_file(file, Options((3, 32, 32), threads=2))
    images = engine.prepare(torch.randn(64, 3, 32, 32))
    shares = []
    for _ in range(5):
        engine.run(images)
        spent, started = time.process_time(), time.perf_counter()
        time.sleep(0.05)
        shares.append((time.process_time() - spent) / (time.perf_counter() - started))
    assert statistics.median(shares) < 0.1


def test_an_engine_without_the_device_says_so(deploy: nn.Module, tmp_path: Path) -> None:
    said: list[str] = []
    save(deploy, tmp_path / "a.safetensors")
    open_model(str(tmp_path / "a.safetensors"), "ncnn", "fp32", 1, "cuda", said.append)
    assert "the engine ncnn knows no cuda: it runs on the CPU" in said
    export(deploy, "onnx", tmp_path / "out", "a", log=str)
    with pytest.raises(ValueError, match="needs its CUDAExecutionProvider"):
        repvgg.load_engine(tmp_path / "out" / "a.onnx", device="cuda")
