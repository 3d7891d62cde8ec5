"""INT8: a deploy form with 8-bit weights and activations, by NNCF, for OpenVINO or ONNX Runtime; and what that costs, measured.

Folding makes weights of very different ranges, which is why a careless INT8 collapses. Against it: a scale for each output
channel, calibration on real images, bias correction; and on demand `equalise`, first and last layer in float, or as many layers
in float as an accuracy that is asked for takes.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from repvgg import zoo
from repvgg.data import Source
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.deploy.engines.graph import Signature, to_onnx
from repvgg.deploy.export import Shape, described, staged, write_report
from repvgg.deploy.load import Runner
from repvgg.deploy.parity import folded
from repvgg.deploy.plain import convolutions, equalise
from repvgg.files import METADATA_KEY
from repvgg.timing import Ratio, interleave, ratio
from repvgg.train.evaluate import Accuracy, batches, evaluate

BATCH = 32  # of the accuracy and the speed
WATCHED = 32  # images on which the signal-to-noise ratio is measured
Log = Callable[[str], object]


@dataclass(frozen=True)
class Quantization:
    """images: to calibrate on. bias_correction: of what rounding weights does to a layer's mean. equalise: first, cross-layer.
    keep: layers left in float, by their number (-1: the classifier). max_drop: of top-1, as a fraction; layers are left in float,
    the worst first, until it is kept."""

    images: int = 300
    bias_correction: Literal["none", "fast", "full"] = "fast"
    equalise: bool = False
    keep: tuple[int, ...] = ()
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("--images: at least one is needed to calibrate on")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise ValueError(f"--max-drop {self.max_drop}: a fraction, such as 0.005 for half a point")


@dataclass(frozen=True)
class Layer:
    """snr: signal to noise in dB after this layer's ReLU, of the INT8 net against the float one. added: the noise that comes in
    here, as a share of the signal's power."""

    name: str
    snr: float
    added: float


@dataclass(frozen=True)
class Report:
    """What INT8 costs and gains: accuracy on the whole validation split, by layer, and speed in the same runtime."""

    path: Path
    before: Accuracy
    after: Accuracy
    layers: list[Layer]
    kept: list[int]
    speedup: Ratio
    images_per_second: tuple[float, float]
    settings: Quantization = field(default_factory=Quantization)

    @property
    def drop(self) -> float:
        """Of top-1, as a fraction."""
        return self.before.top1 - self.after.top1

    def to_json(self) -> dict[str, Any]:
        accuracies = {
            name: {"top1": a.top1, "top5": a.top5, "loss": a.loss, "images": a.images}
            for name, a in (("float", self.before), ("int8", self.after))
        }
        return {
            "precision": "int8",
            "accuracy": accuracies,
            "layers": [asdict(layer) for layer in self.layers],
            "kept_in_float": self.kept,
            "images_per_second": {"float": self.images_per_second[0], "int8": self.images_per_second[1]},
            "speedup": asdict(self.speedup),
            "settings": asdict(self.settings),
        }


def quantize(
    model: nn.Module,
    source: Source,
    to: str,
    out: str | os.PathLike[str],
    name: str = "model",
    settings: Quantization = Quantization(),
    log: Log = print,
) -> Report:
    """Fold a model of ours, quantise it with images of a source, measure what that does, and write it into the folder `out`.

    to: "openvino" or "onnx". Raises ValueError for another format, packages that are missing, data that do not fit the model, or a
    drop that cannot be kept; `ReparamError` for what cannot be folded; `FileError` where it cannot be written.
    """
    if to not in RUNTIMES:
        raise ValueError(f"no INT8 for {to!r}: there are {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[to]
    engines.check(runtime.engine, "fp32")
    if find_spec("nncf") is None:
        raise ValueError("quantising needs nncf: pip install 'repvgg[deploy]'")
    manifest = zoo.manifest_of(model)
    if manifest.classes is not None and len(manifest.classes) != len(source.classes):
        raise ValueError(f"the model knows {len(manifest.classes)} classes, {source.name} has {len(source.classes)}")
    size = manifest.preprocessing.input_size
    if size[0] != source.preprocessing.input_size[0]:
        raise ValueError(f"the model takes images of {size[0]} channels, those of {source.name} have another number")
    deploy = folded(model)
    if settings.equalise:
        deploy = equalise(deploy)
    calibration = source.limited(settings.images).train
    items = [image[None] for x, _ in batches(calibration, manifest.preprocessing, BATCH) for image in x.numpy()]
    watched = torch.from_numpy(np.concatenate(items[:WATCHED]))
    signature = Signature(size)
    with staged(out) as folder:
        path, plain = folder / f"{name}.int8{runtime.suffix}", folder / f".float{runtime.suffix}"
        write = partial(runtime.write, metadata=described(manifest, Shape()).to_json())
        runtime.write(runtime.read(to_onnx(deploy, signature)), plain, "")
        before = _accuracy(_runner(runtime, plain, size, manifest), source, manifest)
        kept = _numbers(settings.keep, len(runtime.layers(runtime.read(plain))))
        names = _names(deploy)
        if settings.max_drop is not None and names is None:
            raise ValueError("--max-drop needs a plain network, whose layers can be told apart")
        while True:
            log(f"quantising on {len(items)} images" + (f", {len(kept)} layers left in float" if kept else ""))
            write(_quantised(runtime, plain, items, kept, settings), path)
            after = _accuracy(_runner(runtime, path, size, manifest), source, manifest)
            layers = _noise(runtime, plain, path, watched, names)
            log(f"top-1 {before.top1:.2%} in float, {after.top1:.2%} in INT8")
            if settings.max_drop is None or before.top1 - after.top1 <= settings.max_drop:
                break
            kept = [*kept, _worst(layers, kept, settings.max_drop)]
        speeds = _speeds(_runner(runtime, plain, size, manifest), _runner(runtime, path, size, manifest), size)
        report = Report(Path(out) / path.name, before, after, layers, sorted(kept), *speeds, settings)
        write_report(path, to, signature, described(manifest, Shape()), report.to_json())
        for file in folder.glob(".float*"):
            file.unlink()
    return report


def _numbers(keep: tuple[int, ...], count: int) -> list[int]:
    """Of layers, counted from the front. Raises ValueError for one that is not there."""
    if wrong := next((n for n in keep if not -count <= n < count), None):
        raise ValueError(f"--keep {wrong}: there are {count} layers")
    return sorted({n % count for n in keep})


def _names(deploy: nn.Module) -> list[str] | None:
    try:
        return convolutions(deploy)
    except ValueError:
        return None


def _worst(layers: list[Layer], kept: list[int], max_drop: float) -> int:
    """The layer that adds most noise of those still in INT8."""
    left = [i for i in range(len(layers)) if i not in kept]
    if not left:
        raise ValueError(f"--max-drop {max_drop}: not kept even with every convolution in float; it is the classifier or chance")
    return max(left, key=lambda i: layers[i].added)


def _quantised(runtime: Any, plain: Path, items: list[Any], kept: list[int], settings: Quantization) -> Any:
    with _quietly():
        import nncf

        network = runtime.read(plain)
        names = [runtime.layers(network)[i] for i in kept]
        return nncf.quantize(
            network,
            nncf.Dataset(items, lambda image: {"images": image}),
            subset_size=len(items),
            target_device=nncf.TargetDevice.CPU,
            fast_bias_correction=settings.bias_correction != "full",
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=settings.bias_correction == "none"),
        )


def _noise(runtime: Any, plain: Path, path: Path, images: Tensor, names: list[str] | None) -> list[Layer]:
    """After each ReLU. It gathers from layer to layer: the layers that hurt are those that add most."""
    found, before = [], 0.0
    exact, rounded = (runtime.activations(file, images.numpy()) for file in (plain, path))
    for i, (a, b) in enumerate(zip(exact, rounded, strict=True)):
        signal, noise = float((a.astype("f8") ** 2).sum()), float(((a.astype("f8") - b) ** 2).sum())
        share = noise / signal if signal else 0.0
        snr = -10 * float(np.log10(max(share, 1e-20)))
        name = names[i] if names and len(names) == len(exact) else f"ReLU {i}"
        found.append(Layer(name, snr, share - before))
        before = share
    return found


def _runner(runtime: Any, path: Path, size: tuple[int, int, int], manifest: Any) -> Runner:
    options = Options(size, BATCH)
    return Runner(runtime.engine, runtime.open_file(path, options), options, manifest)


def _accuracy(runner: Runner, source: Source, manifest: Any) -> Accuracy:
    return evaluate(runner, batches(source.val, manifest.preprocessing, BATCH), len(source.classes))


def _speeds(plain: Runner, rounded: Runner, size: tuple[int, int, int]) -> tuple[Ratio, tuple[float, float]]:
    images = torch.randn(BATCH, *size)
    calls = {name: partial(r.engine.run, r.engine.prepare(images)) for name, r in (("float", plain), ("int8", rounded))}
    times = interleave(calls, rounds=7, batches=3, warmup=2)
    return ratio(times["float"], times["int8"]), (BATCH / times["float"].median, BATCH / times["int8"].median)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """NNCF's progress goes to stderr, its remarks nowhere."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    with contextlib.redirect_stdout(sys.stderr):
        import nncf

        nncf.set_log_level(logging.ERROR)
        yield


# --------------------------------------------------------------------------------------------------------------- two runtimes


class _OpenVINO:
    engine, suffix = "openvino", ".xml"

    @staticmethod
    def read(file: Path | bytes) -> Any:
        import openvino

        return openvino.Core().read_model(file)

    @staticmethod
    def write(network: Any, path: Path, metadata: str) -> None:
        from repvgg.deploy.engines import openvino

        openvino.save(network, path, metadata)

    @staticmethod
    def open_file(path: Path, options: Options) -> Any:
        from repvgg.deploy.engines import openvino

        return openvino.open_file(path, options)

    @staticmethod
    def layers(network: Any) -> list[str]:
        """Names of the convolutions and the classifier, in order."""
        kinds = ("Convolution", "GroupConvolution", "MatMul")
        return [op.get_friendly_name() for op in network.get_ordered_ops() if op.get_type_name() in kinds]

    @staticmethod
    def activations(path: Path, images: Any) -> list[Any]:
        """What comes out of each ReLU."""
        import openvino

        core = openvino.Core()
        network = core.read_model(path)
        relus = [op.output(0) for op in network.get_ordered_ops() if op.get_type_name() == "Relu"]
        count = len(network.outputs)
        network.add_outputs(relus)
        results = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)
        return [np.array(results[count + i]) for i in range(len(relus))]


class _Onnx:
    engine, suffix = "onnxruntime", ".onnx"

    @staticmethod
    def read(file: Path | bytes) -> Any:
        import onnx

        return onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)

    @staticmethod
    def write(network: Any, path: Path, metadata: str) -> None:
        del network.metadata_props[:]
        network.metadata_props.add(key=METADATA_KEY, value=metadata)
        path.write_bytes(network.SerializeToString())

    @staticmethod
    def open_file(path: Path, options: Options) -> Any:
        from repvgg.deploy.engines import onnxruntime

        return onnxruntime.open_file(path, options)

    @staticmethod
    def layers(network: Any) -> list[str]:
        """Names of the convolutions and the classifier, in order."""
        return [node.name for node in network.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]

    @staticmethod
    def activations(path: Path, images: Any) -> list[Any]:
        """What comes out of each ReLU."""
        import onnx
        import onnxruntime

        network = onnx.load(path)
        names = [node.output[0] for node in network.graph.node if node.op_type == "Relu"]
        network.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
        session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
        return list(session.run(names, {"images": images}))


RUNTIMES: dict[str, Any] = {"openvino": _OpenVINO, "onnx": _Onnx}
