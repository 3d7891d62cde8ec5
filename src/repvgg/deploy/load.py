"""A model, or a file that was exported from one, as a callable on one of the engines; by default the fastest on this machine.

e = load_engine("a0.safetensors")                # "auto" measures once, and remembers
logits = e(images)                               # NumPy or torch: float32 [N, C, H, W] -> float32 [N, classes]
e = load_engine("exported/a0.onnx")              # in the runtime that it was made for
"""

import hashlib
import importlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repvgg.deploy import engines
from repvgg.deploy.engines import Engine, Options
from repvgg.deploy.export import FORMATS, report_of
from repvgg.deploy.parity import compare, reference
from repvgg.disk import atomically, cache_folder, describe
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.machine import this_machine
from repvgg.measure.timing import interleave, synchroniser
from repvgg.models import zoo
from repvgg.models.manifest import Manifest
from repvgg.models.pspnet import PSPNETS, PSPNet

# Exported files that are data; pt2 files are programs.
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".param": "ncnn", ".mnn": "mnn"}
# Of the search for the fastest: rounds, and how many times slower than the best an engine may be in them to go on to the next.
KNOCKOUT = ((1, 2.0), (5, 1.15), (15, 1.0))
Log = Callable[[str], object]


class Runner(nn.Module):
    """An engine as a module without parameters: images float32 [N, C, H, W], NumPy or torch, to logits float32 of the same kind.

    Any number of images: they are run `batch_size` at a time. Threads may share it: they take turns. What takes a model of ours
    and only runs it (`predict`, `evaluate_model`) takes this too.
    """

    def __init__(self, name: str, engine: Engine, options: Options, manifest: Manifest | None) -> None:
        super().__init__()
        self.name, self.engine, self.options, self.manifest = name, engine, options, manifest
        self.lock = threading.Lock()
        self.eval()

    @property
    def num_classes(self) -> int | None:
        known = self.manifest and self.manifest.arch
        return known["num_classes"] if known else len(self.manifest.classes or []) or None if self.manifest else None

    def forward(self, images: Any) -> Any:
        """Raises ValueError for images of another size than it was built for."""
        x = torch.from_numpy(images) if isinstance(images, np.ndarray) else images.detach()
        if tuple(x.shape[1:]) != self.options.input_size:
            wanted = ", ".join(map(str, self.options.input_size))
            raise ValueError(f"images are [N, {wanted}] for this engine, not {list(x.shape)}")
        with self.lock:
            logits = self.engine.in_turns(x, self.options.batch_size)
        return logits.numpy() if isinstance(images, np.ndarray) else logits

    def extra_repr(self) -> str:
        return f"{self.name}, {self.options.precision}, batches of {self.options.batch_size}"


def load_engine(
    model: nn.Module | str | os.PathLike[str],
    engine: str = "auto",
    precision: str = "fp32",
    *,
    batch_size: int = 1,
    input_size: tuple[int, int, int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    log: Log = print,
) -> Runner:
    """What runs a model: a module, a model file or a name for its pretrained weights; or an exported file, or the folder of one.

    The model is folded first. engine: a name, or "auto" for the fastest that computes the same (see `fastest`); an exported file
    has its own. batch_size: images at a time, which most engines are built for. input_size: by default the model's own.

    Raises ValueError for an engine that is unknown, missing or without that precision, or that cannot run the model; `FileError`
    for model files; `ReparamError` for a model in train mode.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: at least 1")
    if engine != "auto":
        engines.check(engine, precision, device)
    if not isinstance(model, nn.Module) and (file := exported_file(model)) is not None:
        return _open_exported(file, engine, Options(batch_size=batch_size, precision=precision, threads=threads))
    network = model if isinstance(model, nn.Module) else zoo.open_model(os.fspath(model))
    manifest = zoo.manifest_of(network) if "manifest" in vars(network) else None
    size = input_size or (manifest.preprocessing.input_size if manifest else Options().input_size)
    options = Options(size, batch_size, precision, threads, device=device)
    deploy = reparameterize(network)
    if deploy.fold_report.left:  # type: ignore[union-attr, arg-type]
        log(str(deploy.fold_report))
    name = fastest(deploy, options, log) if engine == "auto" else engine
    return Runner(name, engines.build(name, deploy, options), options, manifest)


def open_model(name_or_path: str, engine: str, precision: str, batch_size: int, device: str, log: Log) -> nn.Module:
    """As `zoo.open_model`; or an engine, where one is asked for or the file is another runtime's.

    Raises ValueError for a precision without an engine, and for an engine that is asked to make masks.
    """
    exported = exported_file(name_or_path)
    if not engine and not exported and precision != "fp32":
        raise ValueError(f"--precision {precision} is an engine's: name one, such as --engine eager")
    model = exported or zoo.open_model(name_or_path)
    if isinstance(model, nn.Module) and not engine:
        return model
    if isinstance(model, PSPNet):
        raise ValueError(f"{name_or_path}: masks of images of any size are made by PyTorch: leave out --engine")
    if engine in engines.ENGINES and not engines.precisions(engine, device):
        device = "cpu"
    runner = load_engine(model, engine or "auto", precision, batch_size=batch_size, device=device, log=log)
    if exported and runner.manifest and (runner.manifest.arch or {}).get("name") in PSPNETS:
        raise ValueError(f"{exported}: masks of images of any size are made by PyTorch: name the model file")
    return runner


# ----------------------------------------------------------------------------------------------------------- the fastest one


def fastest(model: nn.Module, options: Options, log: Log = print) -> str:
    """The name of the engine that runs a folded model fastest, of those that are installed, have the precision and compute what
    PyTorch does in float64.

    Measured once for a model, its batch and this machine: the engines take turns. The figures are kept in ~/.cache/repvgg/engines.
    """
    path = cache_folder() / "engines" / f"{_digest(model, options)}.json"
    with suppress(OSError, ValueError, KeyError):
        return str(json.loads(path.read_text())["fastest"])
    log("measuring the engines, once for this model on this machine: it takes a minute or two")
    found = measure(model, options, log)
    best = next(iter(found))
    text = json.dumps({"fastest": best, "engines": found, "options": asdict(options), "machine": this_machine()}, indent=2)
    with suppress(OSError, ValueError):  # a cache that cannot be written costs time and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda temporary: temporary.write_text(text))
    log(f"{best}: {found[best]['images_per_second']:,.1f} images/s")
    return best


def measure(model: nn.Module, options: Options, log: Log = print) -> dict[str, dict[str, float]]:
    """Images a second and relative error of the engines that are right, the fastest first; each as in the last rounds that it took
    part in. Raises ValueError if none is right."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(max(2, options.batch_size), *options.input_size, generator=random)
    wanted = reference(model, images)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name in engines.installed(options.precision, options.device, log):
        try:
            engine = engines.build(name, model, options)
            parity = compare(engine.in_turns(images, options.batch_size), wanted, options.precision)
        except (ValueError, RuntimeError) as error:
            log(f"left out: {name} ({describe(error).splitlines()[0]})")
            continue
        if parity.ok:
            calls[name] = partial(engine.run, engine.prepare(images[: options.batch_size]))
            errors[name] = parity.error.relative
        else:
            log(f"left out: {name}, {parity}")
    if not calls:
        raise ValueError(f"no engine runs this model in {options.precision} and computes the same")
    figures: dict[str, dict[str, float]] = {}
    batches = 2
    for rounds, slower in KNOCKOUT:
        timed = interleave(calls, rounds=rounds, batches=batches, warmup=1, synchronise=synchroniser(options.device))
        best = min(t.median for t in timed.values())
        for name in sorted(timed, key=lambda name: -timed[name].median):  # the fastest of the last rounds ends up as the last
            figures.pop(name, None)
            figures[name] = {"images_per_second": options.batch_size / timed[name].median, "max_rel_err": errors[name]}
        calls = {name: call for name, call in calls.items() if timed[name].median <= slower * best}
        batches = max(1, min(20, round(0.1 / best)))
    return dict(reversed(figures.items()))


def _digest(model: nn.Module, options: Options) -> str:
    """Of whatever the choice may depend on: the network and its weights, the options, the machine and the versions."""
    machine = this_machine()
    facts = [asdict(options), {key: machine[key] for key in ("processor", "cores", "threads", "gpu", "versions")}, str(model)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------- exported files


def exported_file(path: str | os.PathLike[str]) -> Path | None:
    """The exported file that a path names, or that lies in the folder it names; None for anything else.

    Raises ValueError for a folder with several, and for a pt2 file.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        raise ValueError(f"{path}: a pt2 file is a program; if it is your own, open it with torch.export.load or aoti_load_package")
    if not path.is_dir():
        return path if path.suffix in SUFFIXES else None
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if len(found) > 1:
        raise ValueError(f"{path}: holds {', '.join(p.name for p in found)}: name one of them")
    return found[0] if found else None


def _open_exported(path: Path, engine: str, options: Options) -> Runner:
    """Raises ValueError where it is missing, damaged, not ours, or another engine is asked for."""
    wanted = FORMATS[SUFFIXES[path.suffix]]
    if engine not in ("auto", wanted.engine):
        raise ValueError(f"{path}: is for {wanted.engine}, not for {engine}: leave out --engine")
    engines.check(wanted.engine, options.precision)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    module: Any = importlib.import_module(f"repvgg.deploy.engines.{wanted.module}")
    try:
        text, batch = _told(path, module)
        if text:
            manifest = Manifest.from_json(text)
            options = replace(options, input_size=manifest.preprocessing.input_size)
            opened = module.open_file(path, options)
            return Runner(wanted.engine, replace(opened, batch_size=opened.batch_size or batch), options, manifest)
    except Exception as error:  # of any runtime
        reason = describe(error).splitlines()[0]
        raise ValueError(f"{path}: {wanted.engine} cannot open it, it is damaged or of another version ({reason})") from None
    raise ValueError(f"{path}: was not written by repvgg export, it does not say what goes in and comes out")


def _told(path: Path, module: Any) -> tuple[str | None, int | None]:
    """The manifest in a file, or for a format that has no place for one in the report beside it; and the batch size if that is
    fixed and the runtime does not know."""
    if hasattr(module, "metadata"):
        return module.metadata(path), None
    if not report_of(path).is_file():
        return None, None
    report = json.loads(report_of(path).read_text())
    return json.dumps(report["manifest"]), report["input"]["shape"][0]
