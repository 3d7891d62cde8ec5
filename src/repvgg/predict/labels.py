"""Labels and probabilities of image files."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from repvgg.data.images import ImageError, decode
from repvgg.data.transforms import eval_transform, normalise
from repvgg.models.finite import finite
from repvgg.models.zoo import dtype_of, manifest_of
from repvgg.predict.paths import expand
from repvgg.predict.prediction import Prediction

AT_ONCE = 1 << 28  # numbers: 1 GB


def predict(
    model: nn.Module, patterns: Sequence[str], batch_size: int = 32, top: int = 5, device: str = "cpu"
) -> Iterator[Prediction]:
    """Yield predictions for files, folders (all images below them) and globs, in order, with the model's own preprocessing.

    An image that cannot be read yields a Prediction with an error; the others go on. Raises `ImageError` where a pattern fits
    nothing, ValueError for a batch size or `top` below 1.
    """
    if batch_size < 1 or top < 1:
        raise ValueError("--batch-size and --top are at least 1")
    if not patterns:
        raise ValueError("no images: name files, folders or globs")
    manifest = manifest_of(model)
    transform = eval_transform(manifest.preprocessing)
    channels = manifest.preprocessing.input_size[0]
    paths = expand(patterns)
    batch_size = max(1, min(batch_size, AT_ONCE // math.prod(manifest.preprocessing.input_size)))
    model = model.to(device).eval()
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        inputs: dict[str, Tensor] = {}
        errors: dict[str, str] = {}
        for path in chunk:
            try:
                inputs[path] = transform(decode(path, channels))
            except ImageError as error:
                errors[path] = str(error)
        labels: dict[str, list[tuple[str, float]]] = {}
        if inputs:
            images = normalise(torch.stack(list(inputs.values())).to(device), manifest.preprocessing)
            with torch.inference_mode():
                probabilities = finite(model, images.to(dtype_of(model))).float().softmax(1).cpu()
            labels = dict(zip(inputs, named(probabilities, manifest.classes, top), strict=True))
        for path in chunk:
            yield Prediction(path, labels.get(path, []), errors.get(path), getattr(model, "name", "pytorch"))


def named(probabilities: Tensor, classes: list[str] | None, top: int) -> list[list[tuple[str, float]]]:
    """Return the `top` likeliest classes of each image, by name, with their probabilities."""
    best = probabilities.topk(min(top, probabilities.shape[1]))
    names = classes or [str(i) for i in range(probabilities.shape[1])]
    return [
        [(names[i], p) for i, p in zip(indices, values, strict=True)]
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
