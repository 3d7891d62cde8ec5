"""Masks as a task: photo and mask transformed together, cross-entropy over pixels, intersection over union."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Mask

from repvgg.data import Images, Source
from repvgg.data.masks import IGNORED, ToNetwork
from repvgg.data.transforms import BadImages, Transformed, load, normalise
from repvgg.models.manifest import Preprocessing
from repvgg.models.views import WHOLE, Views, placed, segment
from repvgg.models.zoo import manifest_of
from repvgg.numerics import full_float32
from repvgg.train.distributed import ALONE, World
from repvgg.train.evaluate import check_fit
from repvgg.train.recipes import Recipe


@dataclass(frozen=True)
class Overlap:
    """The agreement of masks, over `images` images. confusion: [classes, classes], in pixels, rows the true class, columns the
    predicted one; pixels without a label do not count. loss: mean over pixels."""

    measure: ClassVar[str] = "mean_iou"

    images: int
    loss: float
    confusion: Tensor
    classes: tuple[str, ...] = ()

    @property
    def per_class(self) -> list[float]:
        """Intersection over union of each class; NaN where it is neither there nor predicted."""
        confusion = self.confusion.double()  # exact: counts are far below 2^53
        right = confusion.diag()
        return (right / (confusion.sum(0) + confusion.sum(1) - right)).tolist()

    @property
    def score(self) -> float:
        """Mean intersection over union, of the classes that are there or predicted."""
        return float(torch.tensor(self.per_class, dtype=torch.float64).nanmean())

    @property
    def pixel_accuracy(self) -> float:
        return float(self.confusion.trace()) / int(self.confusion.sum())

    @property
    def figures(self) -> dict[str, float]:
        return {"loss": self.loss, "mean_iou": self.score, "pixel_accuracy": self.pixel_accuracy}

    def __str__(self) -> str:
        return f"mean IoU {self.score:.2%}, pixel accuracy {self.pixel_accuracy:.2%} ({self.images} images)"


class Segmentation:
    """A mask for each image (see `Task`)."""

    kind: Literal["labels", "masks"] = "masks"
    share = "pixel_accuracy"

    def prepared(self, source: Source, recipe: Recipe) -> Source:
        """Give photos the size that the recipe says; a model's input is the crop."""
        if recipe.crop != "scale":
            raise ValueError(f"--crop {recipe.crop} is for labels, {source.name} has masks: --recipe pspnet or camvid")
        for name in ("auto_augment", "rand_augment", "erasing", "mixup", "cutmix", "image_size", "small_first"):
            if getattr(recipe, name):
                raise ValueError(f"--{name.replace('_', '-')} is for labels, {source.name} has masks")
        p = source.preprocessing
        short = recipe.resize or p.resize
        sides = [round(n * short / p.resize) for n in p.input_size[1:]]
        height, width = (min(recipe.crop_size or n, n) for n in sides)
        return replace(source, preprocessing=replace(p, input_size=(p.input_size[0], height, width), resize=short))

    def check(self, model: nn.Module, source: Source) -> None:
        """Raise ValueError for a network that gives no masks, or others than those of the source."""
        manifest = manifest_of(model)
        if manifest.task != self.kind:
            raise ValueError(f"{source.name} has masks, which {type(model).__name__} does not give: --arch pspnet_repvgg_a0, say")
        check_fit(manifest, source)

    def check_views(self, views: Views) -> None:
        """Accept all views."""

    def train_transform(self, recipe: Recipe, preprocessing: Preprocessing) -> nn.Module:
        """Return a transform from a photo, uint8 [C, H, W], and its mask [H, W] to those of a crop.

        What is outside the photo is of mean colour and no class.
        """
        short, mean = preprocessing.resize, tuple(round(255 * x) for x in preprocessing.mean)
        mode = InterpolationMode(preprocessing.interpolation)
        steps: list[nn.Module] = [
            v2.RandomResize(short // 2 or 1, 2 * short + 1, interpolation=mode, antialias=True),
            v2.RandomCrop(preprocessing.input_size[1:], pad_if_needed=True, fill={Tensor: mean, Mask: IGNORED}),
        ]
        if recipe.flip:
            steps.append(v2.RandomHorizontalFlip())
        if recipe.jitter:
            steps.append(v2.ColorJitter(*[recipe.jitter] * 3))
        transform: nn.Module = v2.Compose([*steps, v2.ToPureTensor()])
        return transform

    def loss(self, outputs: Any, target: Tensor, recipe: Recipe) -> Tensor:
        """Return the mean over the pixels that have a label, zero if there are none; with the auxiliary head's, weighted."""
        if isinstance(outputs, tuple):
            logits, auxiliary = outputs
            return self.loss(logits, target, recipe) + recipe.auxiliary * self.loss(auxiliary, target, recipe)
        y = target.long()
        total = F.cross_entropy(outputs, y, ignore_index=IGNORED, reduction="sum", label_smoothing=recipe.label_smoothing)
        return total / (y != IGNORED).sum().clamp(min=1)

    def right(self, outputs: Any, target: Tensor) -> Tensor:
        """Return the share of the labelled pixels that are recognised."""
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        labelled = target != IGNORED
        share: Tensor = ((logits.argmax(1) == target) & labelled).sum() / labelled.sum().clamp(min=1)
        return share

    def batches(
        self,
        images: Images,
        preprocessing: Preprocessing,
        batch_size: int = 1,
        workers: int = 0,
        device: str = "cpu",
        bad: BadImages | None = None,
        world: World = ALONE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield photos one by one, as they may differ in size: normalised [1, C, H, W], and their masks [1, H', W']."""
        order = range(world.rank, len(images), world.size)
        for pixels, masks in load(Transformed(images, ToNetwork(preprocessing), bad=bad), 1, workers, order):
            if masks.dim() == 3:  # else it is the label -1, of a photo that cannot be read
                yield normalise(pixels.to(device), preprocessing), masks.to(device)

    def evaluate(
        self,
        network: Callable[[Tensor], Tensor],
        data: Iterable[tuple[Tensor, Tensor]],
        num_classes: int,
        world: World = ALONE,
        views: Views = WHOLE,
        window: Sequence[int] = (),
    ) -> Overlap:
        """Run a network in eval mode over photos and masks; scores are upsampled to the masks' own sizes.

        With several processes each brings its share of the photos, and all get the whole. Raises ValueError if there is nothing to
        evaluate on.
        """
        # torchmetrics would count with a table of pixels x classes^2 numbers where algorithms are to be deterministic.
        counts = torch.zeros(num_classes**2, dtype=torch.long, device=world.device)
        losses: list[Tensor] = []
        images = 0
        with torch.no_grad():
            for photos, masks in data:
                full_float32(photos.device)
                masks = masks.long()
                scores = segment(network, photos, (masks.shape[1], masks.shape[2]), window, views)
                if scores.shape[1] != num_classes:
                    raise ValueError(f"the model has {scores.shape[1]} classes, the data {num_classes}")
                losses.append(F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum"))
                labelled = masks != IGNORED
                pairs = masks[labelled] * num_classes + scores.argmax(1)[labelled]
                counts += pairs.bincount(minlength=num_classes**2).to(world.device)
                images += len(masks)
        loss = float(torch.stack(losses).cpu().double().sum()) if losses else 0.0
        sums = torch.tensor([loss, images], dtype=torch.float64)  # which an Apple GPU has not
        sums = world.total(sums.to(world.device)) if world.size > 1 else sums
        confusion = world.total(counts.view(num_classes, num_classes)).cpu()
        pixels = int(confusion.sum())
        if not pixels:
            raise ValueError("there are no images to evaluate on, or no pixel of them has a label")
        return Overlap(int(sums[1]), float(sums[0]) / pixels, confusion)

    def restored(self, confusion: Tensor, **facts: Any) -> Overlap:
        return Overlap(**facts, confusion=confusion)

    def evaluate_model(
        self,
        model: nn.Module,
        source: Source,
        split: str = "val",
        *,
        batch_size: int = 1,
        workers: int = 0,
        device: str = "cpu",
        views: Views = WHOLE,
        bad: BadImages | None = None,
    ) -> Overlap:
        """Evaluate a PSPNet on a split of a source, photo by photo, with the preprocessing that it carries (see `Task`)."""
        self.check(model, source)
        p = manifest_of(model).preprocessing
        data = self.batches(source.split(split), p, workers=workers, device=device, bad=bad)
        world = replace(ALONE, device=device)
        return self.evaluate(placed(model, device), data, len(source.classes), world, views, p.input_size[1:])


SEGMENTATION = Segmentation()
