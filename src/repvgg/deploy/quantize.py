"""INT8: a deploy form with 8-bit weights and activations, by NNCF, for OpenVINO, ONNX Runtime or the native engine; and what that
costs, measured.

Folding makes weights of very different ranges, which is why a careless INT8 collapses. Against it: a scale for each output
channel, calibration on real images, bias correction; and on demand `equalise`, first and last layer in float, as many layers in
float as an accuracy that is asked for takes, or a few epochs of training with the rounding in it.
"""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from repvgg.data import Source
from repvgg.deploy import engines, native_int8
from repvgg.deploy.engines import Int8Runtime, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.deploy.export import Shape, described, write_report
from repvgg.deploy.formats import FORMATS
from repvgg.deploy.parity import folded
from repvgg.deploy.qat import round_convolutions
from repvgg.deploy.runner import Runner
from repvgg.deploy.speedup import Speedup, speedup
from repvgg.deploy.staged import refuse_strangers, staged, written
from repvgg.deploy.surgery import convolutions, equalise, insert_bn
from repvgg.disk import Log
from repvgg.fold.reparameterize import reparameterize
from repvgg.models import zoo
from repvgg.models.load import load, save
from repvgg.train.evaluate import Accuracy, batches, evaluate
from repvgg.train.loop import train
from repvgg.train.recipes import GENTLE, Recipe, get_recipe
from repvgg.train.tasks import CLASSIFICATION

INT8 = ("openvino", "onnx", native_int8.ENGINE)
BATCH = 32  # of the accuracy and the speed
FEW = 5_000  # images
WATCHED = 32  # images on which the signal-to-noise ratio is measured


@dataclass(frozen=True)
class Quantization:
    """Settings of INT8. images: to calibrate on. bias_correction: of what rounding weights does to a layer's mean. equalise: first,
    cross-layer.

    keep: layers left in float, by their number (-1: the classifier). max_drop: of top-1, as a fraction; layers are left in float,
    the worst first, until it is kept. qat_epochs: of training with batch norms inserted and weights and activations rounded, before
    they are rounded for good; qat_lr: its learning rate.
    """

    images: int = 300
    bias_correction: Literal["none", "fast", "full"] = "fast"
    equalise: bool = False
    keep: tuple[int, ...] = ()
    max_drop: float | None = None
    qat_epochs: int = 0
    qat_lr: float = 0.001

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("--images: at least one is needed to calibrate on")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise ValueError(f"--max-drop {self.max_drop}: a fraction, such as 0.005 for half a point")
        if self.qat_epochs < 0 or not 0 < self.qat_lr < 10:
            raise ValueError("--qat-epochs is not negative, --qat-lr above 0 and below 10")


@dataclass(frozen=True)
class LayerNoise:
    """The noise that rounding adds to a layer.

    snr: signal to noise in dB after its ReLU, of the INT8 net against the float one. added: the noise that comes in here, as a
    share of the signal's power.
    """

    name: str
    snr: float
    added: float


@dataclass(frozen=True)
class QuantizationReport:
    """Costs and gains of INT8: accuracy on the whole validation split, by layer, and speed in the same runtime."""

    path: Path
    before: Accuracy
    after: Accuracy
    layers: list[LayerNoise]
    kept: list[int]
    speedup: Speedup
    settings: Quantization = field(default_factory=Quantization)

    @property
    def drop(self) -> float:
        """Loss of top-1, as a fraction."""
        return self.before.top1 - self.after.top1

    def __str__(self) -> str:
        before, after, (slow, fast) = self.before, self.after, self.speedup.images_per_second
        return (
            f"top-1 {before.top1:.2%} in float, {after.top1:.2%} in INT8 ({-self.drop * 100:+.2f} points), "
            f"{after.images:,} images\n"
            f"{slow:,.1f} images/s in float, {fast:,.1f} in INT8: {self.speedup.ratio}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": "int8",
            "accuracy": {name: {**a.figures, "images": a.images} for name, a in (("float", self.before), ("int8", self.after))},
            "layers": [asdict(layer) for layer in self.layers],
            "kept_in_float": self.kept,
            "speed": self.speedup.to_json(),
            "settings": asdict(self.settings),
        }


def quantize(
    model: nn.Module,
    source: Source,
    to: str,
    out: str | os.PathLike[str],
    name: str = "model",
    settings: Quantization = Quantization(),
    device: str = "cpu",
    log: Log = print,
) -> QuantizationReport:
    """Fold a model of ours, quantise it with images of a source, measure what that does, and write it into the folder `out`.

    to: "openvino", "onnx", or "native" for a model file with ranges, without bias correction. device: to train on, if that is asked
    for; all else is the processor's. Raises ValueError for another format, packages that are missing, data that do not fit the
    model, or a drop that cannot be kept; `ReparamError` for what cannot be folded; `FileError` where it cannot be written.
    """
    if to not in INT8:
        raise ValueError(f"no INT8 for {to!r}: there are {', '.join(INT8)}")
    native = to == native_int8.ENGINE
    kind = FORMATS[native_int8.CALIBRATED_FOR if native else to]
    engines.check(kind.engine, "fp32")
    if find_spec("nncf") is None:
        raise ValueError("quantising needs nncf: pip install nncf")
    if source.masks:
        raise ValueError(f"{source.name} has masks, and what INT8 costs is measured on labels")
    CLASSIFICATION.check(model, source)
    manifest = zoo.manifest_of(model)
    deploy = folded(model)
    deploy = equalise(deploy) if settings.equalise else deploy
    if native:
        native_int8.check(deploy)
        settings = replace(settings, bias_correction="none")
    names = _names(deploy)
    if settings.max_drop is not None and names is None:
        raise ValueError("--max-drop needs a plain network, whose layers can be told apart")
    told = described(manifest, Shape())
    signature = Signature(told.preprocessing.input_size)
    images = torch.cat([x for x, _ in batches(source.limited(settings.images).train, told.preprocessing, BATCH)])
    runtime = cast(Int8Runtime, engines.runtime(kind.module))
    file, trained = f"{name}.int8{native_int8.SUFFIX if native else kind.suffix}", f"{name}.qat.safetensors"
    refuse_strangers(out, f"{file}.json", file, trained)
    with staged(out, f"{file}.json") as folder:
        plain, path = folder / f".float{kind.suffix}", folder / file
        graph = folder / f".float.int8{kind.suffix}" if native else path  # what NNCF makes

        def runner(precision: str) -> Runner:
            if native:
                return native_int8.runner(deploy, precision, BATCH)
            options = Options(signature.size, BATCH)
            file = plain if precision == "fp32" else path
            return Runner(kind.engine, runtime.open_file(file, options), options, manifest)

        def accuracy(precision: str) -> Accuracy:
            return evaluate(runner(precision), batches(source.val, told.preprocessing, BATCH), len(source.classes))

        _saved(runtime, runtime.read(to_onnx(deploy, signature)), plain, "")
        before = accuracy("fp32")
        kept = _numbers(settings.keep, len(runtime.layers(runtime.read(plain))))
        if settings.qat_epochs:
            deploy = _trained_rounded(deploy, images, source, settings, device, log)
            save(deploy, folder / trained)
            _saved(runtime, runtime.read(to_onnx(deploy, signature)), plain, "")
        while True:
            log(f"quantising on {len(images)} images" + (f", {len(kept)} layers left in float" if kept else ""))
            rounded = _quantised(runtime, plain, images, kept, settings)
            _saved(runtime, rounded, graph, told.to_json())
            if native:
                native_int8.write(deploy, rounded, path)
            after = accuracy("int8")
            layers = _noise(runtime, plain, graph, images[:WATCHED], names)
            log(f"top-1 {before.top1:.2%} in float, {after.top1:.2%} in INT8")
            if settings.max_drop is None or before.top1 - after.top1 <= settings.max_drop:
                break
            kept = [*kept, _worst(layers, kept, settings.max_drop)]
        faster = speedup(runner("fp32"), runner("int8"))
        report = QuantizationReport(Path(out) / path.name, before, after, layers, sorted(kept), faster, settings)
        write_report(path, to, signature, told, report.to_json())
        for left in folder.glob(".float*"):
            left.unlink()
    return report


def _trained_rounded(deploy: nn.Module, images: Tensor, source: Source, settings: Quantization, device: str, log: Log) -> nn.Module:
    """The deploy form after some epochs in which it computed as INT8 does (quantisation-aware training)."""
    network = insert_bn(deploy, images)
    zoo.remember(network, replace(zoo.manifest_of(network), classes=source.classes))  # as many, whatever they are called
    round_convolutions(network)
    recipe = replace(qat_recipe(source), epochs=settings.qat_epochs, lr=settings.qat_lr)
    with tempfile.TemporaryDirectory() as folder:
        train("", source, recipe, folder, init=network, device=device, log=log)
        return reparameterize(load(Path(folder) / "best.safetensors"))


def qat_recipe(source: Source) -> Recipe:
    """Return the source's own recipe, but gentle. The batch norms keep the statistics that undo them: those of the few batches of a
    training, augmented as they are, would change the network more than the rounding does."""
    recipe = replace(get_recipe(source.recipe), **GENTLE)
    size = min(recipe.batch_size, 32 if len(source.train) < FEW else 64)  # else few images were few steps
    return replace(recipe, batch_size=size, warmup_epochs=0, mixup=0, precision="fp32", freeze_bn=True)


def _numbers(keep: tuple[int, ...], count: int) -> list[int]:
    """Return layers' numbers, counted from the front. Raises ValueError for one that is not there."""
    if wrong := next((n for n in keep if not -count <= n < count), None):
        raise ValueError(f"--keep {wrong}: there are {count} layers")
    return sorted({n % count for n in keep})


def _names(deploy: nn.Module) -> list[str] | None:
    try:
        return convolutions(deploy)
    except ValueError:
        return None


def _worst(layers: list[LayerNoise], kept: list[int], max_drop: float) -> int:
    """The layer that adds most noise of those still in INT8."""
    left = [i for i in range(len(layers)) if i not in kept]
    if not left:
        raise ValueError(f"--max-drop {max_drop}: exceeded even with every convolution in float, by the classifier or by chance")
    return max(left, key=lambda i: layers[i].added)


def _saved(runtime: Int8Runtime, network: Any, path: Path, metadata: str) -> None:
    try:
        runtime.save(network, path, metadata)
    except Exception as error:  # of either runtime
        raise written("INT8", error) from None


def _quantised(runtime: Int8Runtime, plain: Path, images: Tensor, kept: list[int], settings: Quantization) -> Any:
    with _quietly():
        import nncf

        network = runtime.read(plain)
        names = [runtime.layers(network)[i] for i in kept]
        return nncf.quantize(
            network,
            nncf.Dataset(images.split(1), lambda image: {"images": image.numpy()}),
            subset_size=len(images),
            target_device=nncf.TargetDevice.CPU,
            fast_bias_correction=settings.bias_correction != "full",
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=settings.bias_correction == "none"),
        )


def _noise(runtime: Int8Runtime, plain: Path, path: Path, images: Tensor, names: list[str] | None) -> list[LayerNoise]:
    """After each ReLU. It gathers from layer to layer: the layers that hurt are those that add most."""
    found, before = [], 0.0
    exact, rounded = (runtime.activations(file, images.numpy()) for file in (plain, path))
    for i, (a, b) in enumerate(zip(exact, rounded, strict=True)):
        signal, noise = float((a.astype("f8") ** 2).sum()), float(((a.astype("f8") - b) ** 2).sum())
        share = noise / signal if signal else 0.0
        snr = -10 * float(np.log10(max(share, 1e-20)))
        name = names[i] if names and len(names) == len(exact) else f"ReLU {i}"
        found.append(LayerNoise(name, snr, share - before))
        before = share
    return found


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """NNCF's progress goes to stderr, its remarks nowhere."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA
    with contextlib.redirect_stdout(sys.stderr):
        import nncf

        nncf.set_log_level(logging.ERROR)
        yield
