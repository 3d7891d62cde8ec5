"""Models as files of other runtimes: folded, written, loaded back, run, and compared with PyTorch before they are called done.

    export("a0.safetensors", "onnx", "exported")          # exported/a0.onnx, and exported/a0.onnx.json

The .json beside a file says what goes in, what comes out, how images are prepared, the classes' names, and how exact the file
was found to be; the .py beside it runs the file on a photo. Formats that can hold the same inside, do.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.data import open_source
from repvgg.data.transforms import eval_transform, normalise
from repvgg.deploy import engines, example
from repvgg.deploy.engines import Engine, Options, Runtime, Signature
from repvgg.deploy.formats import FORMATS, report_of
from repvgg.deploy.parity import Parity, compare, folded, reference
from repvgg.deploy.staged import refuse_strangers, staged, written
from repvgg.disk import Log, in_a_line
from repvgg.measure.machine import this_machine
from repvgg.models import zoo
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.train.evaluate import batches

LARGE = 3 * 512 * 512  # numbers in an image of which eight in float64 take too long


@dataclass(frozen=True)
class Shape:
    """Images that the file shall take. batch_size: None for any; any_size: any height and width; pixels: uint8 pixels, so that the
    graph normalises; image_size: uint8 pixels of that height and width, so that the graph resizes and crops too."""

    batch_size: int | None = None
    any_size: bool = False
    pixels: bool = False
    image_size: tuple[int, int] | None = None

    def refused_by(self, name: str) -> str | None:
        """Return why that format cannot hold such a graph, if so."""
        has = FORMATS[name]
        if self.batch_size is not None and self.batch_size < 1:
            return f"--batch-size {self.batch_size}: at least 1, or 0 for any"
        if self.any_size and self.image_size:
            return "images of any size and of one size at once: leave out --any-size or --image-size"
        if not has.any_batch and self.batch_size not in (None, 1):
            return f"{name} runs one image at a time: leave out --batch-size"
        if not has.pixels and (self.pixels or self.image_size):
            return f"{name} graphs take no uint8 pixels: leave out --pixels and --image-size; it has functions of its own for that"
        return None


class FromPixels(nn.Module):
    """Maps uint8 pixels [N, C, H, W] to logits: preparing an image is a part of the graph.

    Resizing is linear, so it is two products with matrices, which every runtime has and none does in its own way. `predict` rounds
    the resized image to whole grey levels, this does not.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, network: nn.Module, p: Preprocessing, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.network = network
        dtype = next(network.parameters()).dtype
        mean, std = (torch.tensor(values, dtype=torch.float64).mul(255).view(1, -1, 1, 1) for values in (p.mean, p.std))
        self.register_buffer("mean", mean.to(dtype))
        self.register_buffer("std", std.to(dtype))
        rows = columns = None
        if image_size is not None:
            rows, columns = (m.to(dtype) for m in resize_and_crop(image_size, p))
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.overshoots = rows is not None and p.interpolation == "bicubic"
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.mean.dtype)
        if self.rows is not None and self.columns is not None:
            x = self.rows @ x @ self.columns
            x = x.clamp(0, 255) if self.overshoots else x
        return self.network((x - self.mean) / self.std)  # type: ignore[no-any-return]


def resize_and_crop(image_size: tuple[int, int], p: Preprocessing) -> tuple[Tensor, Tensor]:
    """Matrices [h, H] and [W, w], float64, so that `rows @ image @ columns` is the image with its short side resized and its centre
    cropped, antialiased, as torchvision does it. Raises ValueError for images too small to be cropped."""
    short = min(image_size)
    matrices = []
    for side, wanted in zip(image_size, p.input_size[1:], strict=True):
        resized = p.resize if side == short else int(p.resize * side / short)
        if resized < wanted:
            raise ValueError(f"--image-size: {image_size[0]} x {image_size[1]}, resized to {p.resize}, is too small to crop")
        antialias = {"antialias": True} if p.interpolation != "nearest" else {}
        identity = torch.eye(side, dtype=torch.float64)[None, None]
        matrix = F.interpolate(identity, (resized, side), mode=p.interpolation, **antialias)[0, 0]  # type: ignore[arg-type]
        first = round((resized - wanted) / 2)
        matrices.append(matrix[first : first + wanted])
    return matrices[0], matrices[1].T.contiguous()


# ------------------------------------------------------------------------------------------------------------------- export


def export(
    model: nn.Module,
    to: str,
    out: str | os.PathLike[str],
    name: str = "model",
    shape: Shape = Shape(),
    images: Tensor | None = None,
    log: Log = print,
) -> Path:
    """Fold a model of ours, write it into the folder `out` as NAME with the format's suffix, and prove the file. Returns its path.

    images: to compare on, as the file takes them; by default eight random ones. Raises ValueError for an unknown format or one that
    is not installed or cannot hold such a graph, `ReparamError` for what cannot be folded, `FileError` where it cannot be written.
    No file is left unless it computes the same.
    """
    if to not in FORMATS:
        raise ValueError(f"no format {to!r}: there are {', '.join(FORMATS)}")
    engines.check(FORMATS[to].engine, "fp32")
    if reason := shape.refused_by(to):
        raise ValueError(reason)
    deploy, original, manifest = folded(model), model, zoo.manifest_of(model)
    if shape.pixels or shape.image_size:
        deploy, original = (FromPixels(m, manifest.preprocessing, shape.image_size) for m in (deploy, model))
    manifest = described(manifest, shape)
    signature = Signature(
        manifest.preprocessing.input_size,
        shape.batch_size if FORMATS[to].any_batch else 1,
        shape.any_size,
        torch.uint8 if shape.pixels or shape.image_size else torch.float32,
    )
    if shape.any_size and manifest.task == "masks":
        raise ValueError("a PSPNet's file is for images of one size, its pyramid's bins depend on it: leave out --any-size")
    samples = [random_images(signature) if images is None else images.to(signature.dtype)]
    if shape.any_size:
        channels, height, width = signature.size
        samples.append(random_images(replace(signature, size=(channels, height + height // 2, width + width // 4))))
    file = name + FORMATS[to].suffix
    refuse_strangers(out, f"{file}.json", file)
    with staged(out, f"{file}.json") as folder:
        path = folder / file
        runtime = engines.runtime(FORMATS[to].module)
        try:
            runtime.write(deploy, signature, path, manifest.to_json())
        except Exception as error:  # of any runtime
            raise written(to, error) from None
        found = [_prove(_opened(runtime, path, signature, x), original, x) for x in samples]
        report = max(found, key=lambda parity: parity.error.relative)
        if bad := next((parity for parity in found if not parity.ok), None):
            raise ValueError(f"the {to} file computes something else, so it was not kept: {bad}")
        write_report(path, to, signature, manifest, {"parity": asdict(report)}, resized=bool(shape.image_size))
    log(f"{Path(out) / path.name}: {report}")
    return Path(out) / path.name


def described(manifest: Manifest, shape: Shape) -> Manifest:
    """Return what an exported file says of itself: what is done to an image before it goes in."""
    p = manifest.preprocessing
    if shape.pixels or shape.image_size:  # float pixels are left as they are
        p = replace(p, mean=(0.0,) * len(p.mean), std=(1 / 255,) * len(p.std))
    if shape.image_size:
        p = replace(p, input_size=(p.input_size[0], *shape.image_size), resize=min(shape.image_size))
    return replace(manifest, form="deploy", layers=None, preprocessing=p)


def real_images(model: nn.Module, data: str, count: int, shape: Shape = Shape()) -> Tensor:
    """Return `count` images of the validation split that `data` names, prepared as an exported file of that shape takes them."""
    if count < 1:
        raise ValueError(f"--images {count}: at least 1")
    source, p = open_source(data).limited(count), described(zoo.manifest_of(model), shape).preprocessing
    channels = source.preprocessing.input_size[0]
    if channels != p.input_size[0]:
        raise ValueError(f"--data {data}: its images have {channels} channels, and the model takes {p.input_size[0]}")
    if source.masks:  # the photos alone
        prepare = eval_transform(p)
        return normalise(torch.stack([prepare(source.val[i][0]) for i in range(len(source.val))]), p)
    return torch.cat([x for x, _ in batches(source.val, p, 64)])


def random_images(signature: Signature) -> Tensor:
    """Return eight images, of large ones two: normal numbers, or pixels of any value."""
    random = torch.Generator().manual_seed(0)
    count = 8 if math.prod(signature.size) <= LARGE else 2
    if signature.dtype == torch.uint8:
        return torch.randint(0, 256, (count, *signature.size), generator=random, dtype=torch.uint8)
    return torch.randn(count, *signature.size, generator=random)


def write_report(
    path: Path, to: str, signature: Signature, manifest: Manifest, found: dict[str, Any], resized: bool = False
) -> None:
    """Write the .json beside an exported file, and the .py that runs it. resized: the graph resizes what goes in."""
    sides = (None, None) if signature.any_size else signature.size[1:]
    pixels = signature.dtype == torch.uint8
    if code := example.program(path.name, to, manifest, signature.batch, pixels, resized):
        path.with_name(f"{path.name}.py").write_text(code)
    told = {
        "format": to,
        "input": {
            "name": "images",
            "dtype": str(signature.dtype).removeprefix("torch."),
            "shape": [signature.batch, signature.size[0], *sides],
            "preparation": example.preparation(manifest.preprocessing, pixels, resized),
        },
        "output": {"name": "logits", "dtype": "float32", "then": "softmax gives probabilities, in the order of labels"},
        "labels": manifest.classes,
        "manifest": json.loads(manifest.to_json()),
        **found,
        "machine": this_machine(),
    }
    report_of(path).write_text(json.dumps(told, indent=2) + "\n")


def _opened(runtime: Runtime, path: Path, signature: Signature, images: Tensor) -> Engine:
    _, channels, height, width = images.shape
    try:
        engine = runtime.open_file(path, Options((channels, height, width), signature.batch or 4))
    except Exception as error:  # of any runtime
        raise ValueError(f"{path.name} cannot be loaded back ({in_a_line(error)})") from None
    return replace(engine, batch_size=signature.batch or engine.batch_size)


def _prove(engine: Engine, original: nn.Module, images: Tensor) -> Parity:
    try:
        logits = engine.in_turns(images, 4)
    except Exception as error:
        raise ValueError(f"the file was written, but cannot be run ({in_a_line(error)})") from None
    return compare(logits, reference(original, images))
