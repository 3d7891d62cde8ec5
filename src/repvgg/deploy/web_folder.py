"""A folder for anybody's page: the native engine as WebAssembly, a model, its plan, and a page of twenty lines that classifies.

    write_web(repvgg.load("a0.safetensors"), "site")         # then, for instance: python -m http.server -d site

The engine (190 kB) runs on one thread, in every browser with 128-bit vectors: those since 2023.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from repvgg.deploy import engines
from repvgg.deploy.engines import Signature
from repvgg.deploy.export import Shape, random_images, write_report
from repvgg.deploy.parity import Parity, compare, folded, reference
from repvgg.deploy.staged import refuse_strangers, staged
from repvgg.disk import Log
from repvgg.models import zoo
from repvgg.models.load import save
from repvgg.models.plain import layer_list

MODEL, PLAN, PAGE = "model.safetensors", "plan.json", "index.html"
# Bytes of packed weights: a page that takes much more memory is reloaded by telephones.
MEMORY_LIMIT = 128 << 20


def write_web(model: nn.Module, out: str | os.PathLike[str], shape: Shape | None = None, log: Log = print) -> Path:
    """Fold a classifier of ours and write the folder. Returns the path of its page.

    Raises ValueError for a PSPNet, a backbone, a network that is no plain stack, a shape of images other than the model's own, or
    where the engine is not installed; `ReparamError` for what cannot be folded; `FileError` where the folder cannot be written.
    No file is left unless the same algorithms, in the engine's build for this processor, compute the same.
    """
    if shape not in (None, Shape()):
        raise ValueError("a page prepares its images itself: leave out --batch-size, --any-size, --pixels and --image-size")
    refuse_strangers(out, f"{PAGE}.json", PAGE, MODEL)
    with staged(out, f"{PAGE}.json") as folder:
        parity, deploy = write_model(model, folder)
        for file in engine_files():
            shutil.copyfile(file, folder / file.name)
        manifest = zoo.manifest_of(deploy)
        signature = Signature(manifest.preprocessing.input_size, batch=1)
        write_report(folder / PAGE, "web", signature, manifest, {"parity": asdict(parity)})
    log(f"{Path(out) / PAGE}: {parity}")
    return Path(out) / PAGE


def write_model(model: nn.Module, folder: Path) -> tuple[Parity, nn.Module]:
    """Write the deploy form and its plan, prove both by the engine's portable build, and return the proof and that form."""
    engines.check("native", "fp32")
    import repvgg_engine

    if (channels := zoo.manifest_of(model).preprocessing.input_size[0]) not in (1, 3):
        raise ValueError(f"a page shows the model photos, of 3 channels or 1, and this one takes {channels}")
    if zoo.manifest_of(model).task == "masks":
        raise ValueError("a page classifies, and a PSPNet makes masks: export it --to onnx, for onnxruntime-web")
    deploy = folded(model)
    if (layers := layer_list(deploy)) and layers[-1]["op"] != "linear":
        raise ValueError("a page classifies, and this model ends before its classes: give it num_classes, or export it --to onnx")
    save(deploy, folder / MODEL)
    plan = repvgg_engine.plan(folder / MODEL, isa="portable", threads=1, memory_limit=MEMORY_LIMIT)
    (folder / PLAN).write_text(plan.to_json())
    images = random_images(Signature(zoo.manifest_of(deploy).preprocessing.input_size))
    net = repvgg_engine.load(folder / MODEL, plan=plan, threads=1)
    parity = compare(torch.from_numpy(net(images.numpy())), reference(model, images))
    if not parity.ok:
        raise ValueError(f"the engine computes something else, so nothing was kept: {parity}")
    return parity, deploy


def engine_files() -> list[Path]:
    """Return the engine's files for a page: WebAssembly, JavaScript and the page. Raises ValueError where they are not there."""
    engines.check("native", "fp32")
    import repvgg_engine

    folder = Path(repvgg_engine.__file__).parent / "browser"
    files = [folder / name for name in ("repvgg_engine.wasm", "repvgg_engine.relaxed.wasm", "repvgg_engine.mjs", PAGE)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"the native engine was installed without {missing[0]}: make wasm, then pip install ./engine")
    return files
