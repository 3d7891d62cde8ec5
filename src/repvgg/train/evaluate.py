"""Accuracy of a classifier: top-1, top-5, per class, and the confusion matrix."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.data import Images, Source
from repvgg.data.resident import Resident
from repvgg.data.transforms import BadImages, Transformed, eval_transform, load, load_lanes, normalise
from repvgg.models.finite import finite
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.zoo import dtype_of, manifest_of
from repvgg.numerics import full_float32
from repvgg.train.distributed import ALONE, World

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on `images` images. confusion: [classes, classes], rows the true class, columns the predicted one.
    classes: their names, where they were asked for."""

    measure: ClassVar[str] = "top1"

    images: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor
    classes: tuple[str, ...] = ()

    @property
    def per_class(self) -> list[float]:
        """Share of each class's images that were recognised, its recall (NaN where there are none)."""
        return (self.confusion.diag() / self.confusion.sum(dim=1)).tolist()

    @property
    def precision(self) -> list[float]:
        """Share of the images taken for each class that are of it (NaN where there are none)."""
        return (self.confusion.diag().double() / self.confusion.sum(dim=0)).tolist()

    @property
    def f1(self) -> list[float]:
        """Harmonic mean of precision and recall (`per_class`) of each class (NaN where it is neither there nor predicted)."""
        return (2.0 * self.confusion.diag().double() / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1))).tolist()

    @property
    def score(self) -> float:
        """The figure that the best model is chosen by."""
        return self.top1

    @property
    def figures(self) -> dict[str, float]:
        """All that is logged."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%} ({self.images} images)"


def batches(
    images: Images,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    device: str = "cpu",
    bad: BadImages | None = None,
    world: World = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images [N, C, H, W] and labels [N], each once and in one order; of several processes each has its share."""
    resident = Resident.of(images, preprocessing, device)
    if resident is not None and bad is None:
        own = torch.arange(len(images))[world.rank :: world.size]
        for indices in own.split(batch_size) if len(own) else ():
            pixels, labels = resident.batch(indices)
            yield normalise(pixels, preprocessing), labels
        return
    transformed = Transformed(images, eval_transform(preprocessing), bad=bad)
    in_order = getattr(images, "in_order", None)  # of a stream
    if in_order:
        loaded = load_lanes(transformed, in_order(world.rank, world.size, batch_size), workers)
    else:
        loaded = load(transformed, batch_size, workers, range(world.rank, len(images), world.size))
    for pixels, labels in loaded:
        yield normalise(pixels.to(device), preprocessing), labels.to(device)


@torch.no_grad()
def evaluate(network: Network, data: Iterable[tuple[Tensor, Tensor]], num_classes: int, world: World = ALONE) -> Accuracy:
    """Run a network in eval mode over batches of normalised images and labels; those labelled -1 do not count.

    With several processes each brings its share of the images, and all get the whole. Raises ValueError if there are no images.
    """
    sums: list[Tensor] = []  # the loss, and how many are among the first five; on the device until the end, which nobody waits for
    pairs = torch.zeros(num_classes**2, dtype=torch.long)
    for images, labels in data:
        full_float32(images.device)
        logits = network(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if logits.shape[1] != num_classes:
            raise ValueError(f"the model has {logits.shape[1]} classes, the data {num_classes}")
        counts = labels >= 0
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
        top5 = (logits.topk(min(5, num_classes)).indices == labels[:, None]).sum()
        sums.append(torch.stack([loss, top5.to(loss.dtype)]))
        pairs = pairs.to(logits.device)
        pairs.index_add_(0, labels.clamp(min=0) * num_classes + logits.argmax(1), counts.long())
    total = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(2, dtype=torch.float64)
    loss, top5 = world.total(total.to(world.device)).tolist()
    confusion = world.total(pairs.view(num_classes, num_classes).to(world.device)).cpu()
    count = int(confusion.sum())
    if not count:
        raise ValueError("there are no images to evaluate on")
    return Accuracy(count, loss / count, float(confusion.trace()) / count, top5 / count, confusion)


def evaluate_model(
    model: nn.Module,
    source: Source,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    bad: BadImages | None = None,
) -> Accuracy:
    """Evaluate a model on the validation split of a source, with the preprocessing that the model carries.

    bad: list images that cannot be read there, and leave them out. Raises ValueError if the two differ in the number of classes or
    channels.
    """
    manifest = manifest_of(model)
    check_fit(manifest, source)
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: at least 1")
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    dtype = dtype_of(model)
    data = batches(source.val, manifest.preprocessing, batch_size, workers, device, bad)
    return evaluate(lambda x: finite(model, x.to(dtype)), data, len(source.classes))


def check_fit(manifest: Manifest, source: Source) -> None:
    """Raise ValueError where a model and a source differ in the number of channels or classes, or in the order of the same classes.

    Classes of other names are taken by their numbers (see `told_apart`).
    """
    own, given = manifest.preprocessing.input_size[0], source.preprocessing.input_size[0]
    if own != given:
        raise ValueError(f"the model takes images of {own} channels, those of {source.name} have {given}")
    if manifest.classes is None:
        return
    if len(manifest.classes) != len(source.classes):
        raise ValueError(f"the model knows {len(manifest.classes)} classes, {source.name} has {len(source.classes)}")
    if sorted(manifest.classes) == sorted(source.classes) and (apart := told_apart(manifest, source)):
        number, (theirs, name) = next(iter(apart.items()))
        raise ValueError(
            f"{source.name}: its classes are the model's in another order (number {number} is {name!r}, the model's {theirs!r}): "
            "give them names that sort as the model's classes do, such as 0_NAME, 1_NAME"
        )


def told_apart(manifest: Manifest, source: Source) -> dict[int, tuple[str, str]]:
    """Return the numbers of the classes that a model and a source call by other names, with both names."""
    pairs = enumerate(zip(manifest.classes or source.classes, source.classes, strict=True))
    return {number: pair for number, pair in pairs if pair[0] != pair[1]}
