"""Class activation maps: where in an image the evidence for a class lies (Zhou et al., CVPR 2016).

    maps = class_maps(model, images)          # [N, classes, h, w]; the mean of a map plus the bias is the logit, exactly

A network that ends in a mean over all places and a linear layer needs no approximation: applied to each place, its own classifier
says what that place adds to the logit.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from repvgg.data.images import ImageError, decode
from repvgg.data.transforms import eval_transform, normalise
from repvgg.disk import EVIDENCE, atomically
from repvgg.models.finite import finite
from repvgg.models.zoo import dtype_of, manifest_of
from repvgg.predict.labels import named
from repvgg.predict.paths import expand, targets
from repvgg.predict.prediction import Prediction

FOR, AGAINST = (214, 69, 32), (47, 108, 171)  # colours of evidence
STRONGEST = 0.75  # share of the colour where the evidence is largest
SMALLEST = 224  # pixels of a picture's short side
TOLERANCE = 1e-3  # of the largest logit; float16 has 5e-4


@torch.inference_mode()
def class_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class activation maps [N, classes, h, w] of normalised images [N, C, H, W], of a model in eval mode.

    Raises ValueError for a model whose logits are not the means of such maps, plus a bias.
    """
    features, head = features_of(model, images), classifier_of(model)
    logits = model(images)
    fits = features.dim() == 4 and features.shape[1] == head.in_features
    maps = F.conv2d(features, head.weight[:, :, None, None]) if fits else features
    near = TOLERANCE * float(logits.abs().max())
    if not fits or not torch.allclose(F.adaptive_avg_pool2d(maps, 1).flatten(1) + _bias(head), logits, rtol=0, atol=near):
        raise ValueError("--explain cam: this model does more than take the mean over all places and a linear layer of it")
    return maps


def _bias(head: nn.Linear) -> Tensor | float:
    return 0.0 if head.bias is None else head.bias


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature map [N, C, h, w]. Raises ValueError for a model that does not give it."""
    if not hasattr(model, "forward_features"):
        raise ValueError(f"--explain cam: {type(model).__name__} does not give its last feature map: take a model file of ours")
    found: Tensor = model.forward_features(images)  # type: ignore[operator]
    return found


def classifier_of(model: nn.Module) -> nn.Linear:
    """Return the linear layer that gives the logits. Raises ValueError where there is none."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not last:
        raise ValueError("--explain cam: this model has no linear classifier")
    return last[-1]


def explain(
    model: nn.Module, patterns: Sequence[str], out: Path | None = None, top: int = 5, device: str = "cpu"
) -> Iterator[Prediction]:
    """Yield predictions as `predict` does, each with a picture of the evidence for its likeliest class: NAME.cam.png.

    The picture is what the network saw, red where it speaks for the class and blue where it speaks against it. out: the folder of
    the pictures; by default each lies beside its image, and whoever walks that folder leaves it out. Raises ValueError for masks,
    and for two images of one name.
    """
    manifest = manifest_of(model)
    if manifest.task != "labels":
        raise ValueError("--explain cam is for labels: a mask shows itself what was found where")
    if top < 1:
        raise ValueError(f"--top {top}: at least 1")
    transform, p = eval_transform(manifest.preprocessing), manifest.preprocessing
    model = model.to(device).eval()
    for path, made in targets(expand(patterns), out).items():
        target = made.with_name(made.name + EVIDENCE)
        try:
            pixels = transform(decode(path, p.input_size[0]))
        except ImageError as error:
            yield Prediction(path, [], str(error))
            continue
        x = normalise(pixels.unsqueeze(0).to(device), p).to(dtype_of(model))
        with torch.inference_mode():
            logits = finite(model, x).float()
        (labels,) = named(logits.softmax(1).cpu(), manifest.classes, top)
        evidence = class_maps(model, x)[0, int(logits.argmax())].float().cpu()
        target.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        shown(pixels, evidence).save(data, "PNG")
        atomically(target, partial(_write, data.getvalue()))
        yield replace(Prediction(path, labels), explanation=str(target))


def shown(pixels: Tensor, evidence: Tensor) -> Image.Image:
    """Return an image, uint8 [C, H, W], in grey under the colours of its evidence [h, w]."""
    scale = max(1.0, SMALLEST / min(pixels.shape[1:]))
    size = [round(side * scale) for side in pixels.shape[1:]]
    photo = F.interpolate(pixels[None].float(), size, mode="bilinear" if scale > 1 else "nearest")[0].mean(0).numpy()
    strength = F.interpolate(evidence[None, None], size, mode="bilinear", align_corners=False)[0, 0].numpy()
    share = STRONGEST * np.abs(strength) / max(float(np.abs(strength).max()), 1e-12)
    colour = np.where(strength[..., None] > 0, np.array(FOR), np.array(AGAINST))
    grey = np.repeat(photo[..., None], 3, axis=2)
    return Image.fromarray((grey * (1 - share[..., None]) + colour * share[..., None]).round().clip(0, 255).astype(np.uint8))


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)
