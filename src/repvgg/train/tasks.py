"""What is learnt: a label for each image, or a mask. This much the feed, the trainer and the loop know of it, and no more."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.data import Images, Source
from repvgg.data.transforms import BadImages
from repvgg.models.manifest import Preprocessing
from repvgg.models.pspnet import PSPNet
from repvgg.train import augment, evaluate
from repvgg.train.distributed import ALONE, World
from repvgg.train.recipes import Recipe


class Evaluation(Protocol):
    """How good a network is. measure: the name of `score`, by which the best model is chosen; figures: all that is logged."""

    measure: ClassVar[str]

    @property
    def images(self) -> int: ...
    @property
    def confusion(self) -> Tensor: ...
    @property
    def score(self) -> float: ...
    @property
    def figures(self) -> dict[str, float]: ...


class Task(Protocol):
    """share: the name of what `right` returns."""

    share: str

    def prepared(self, source: Source, recipe: Recipe) -> Source:
        """The source as this recipe wants it. Raises ValueError for a recipe that is for something else."""
        ...

    def check(self, model: nn.Module, source: Source) -> None:
        """Raises ValueError for a model that is for something else."""
        ...

    def train_transform(self, recipe: Recipe, preprocessing: Preprocessing) -> nn.Module: ...

    def loss(self, outputs: Any, target: Tensor, recipe: Recipe) -> Tensor:
        """Of what the network returns in train mode."""
        ...

    def right(self, outputs: Any, target: Tensor) -> Tensor:
        """The share that is recognised."""
        ...

    def batches(
        self,
        images: Images,
        preprocessing: Preprocessing,
        batch_size: int,
        workers: int = 0,
        device: str = "cpu",
        bad: BadImages | None = None,
        world: World = ALONE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the images to evaluate on, normalised, and what is true of them."""
        ...

    def evaluate(
        self, network: Callable[[Tensor], Tensor], data: Iterable[tuple[Tensor, Tensor]], num_classes: int, world: World = ALONE
    ) -> Evaluation: ...

    def restored(self, confusion: Tensor, **facts: Any) -> Evaluation:
        """What `evaluate` returned, from its fields."""
        ...


class Classification:
    """A label for each image."""

    share = "top1"
    batches = staticmethod(evaluate.batches)
    evaluate = staticmethod(evaluate.evaluate)
    train_transform = staticmethod(augment.train_transform)

    def prepared(self, source: Source, recipe: Recipe) -> Source:
        for name in ("crop_size", "resize", "jitter"):
            if getattr(recipe, name):
                raise ValueError(f"--{name.replace('_', '-')} is for masks, {source.name} has labels")
        if recipe.crop == "scale":
            raise ValueError(f"--crop scale is for masks, {source.name} has labels")
        return source

    def check(self, model: nn.Module, source: Source) -> None:
        if isinstance(model, PSPNet):
            raise ValueError(f"{source.name} has labels, and a PSPNet gives masks: --data camvid:ROOT or cityscapes:ROOT")

    def loss(self, outputs: Any, target: Tensor, recipe: Recipe) -> Tensor:
        return F.cross_entropy(outputs, target, label_smoothing=recipe.label_smoothing)

    def right(self, outputs: Any, target: Tensor) -> Tensor:
        return (outputs.argmax(1) == target).float().mean()  # type: ignore[no-any-return]

    def restored(self, confusion: Tensor, **facts: Any) -> Evaluation:
        return evaluate.Accuracy(**facts, confusion=confusion)


CLASSIFICATION = Classification()


def task_of(source: Source) -> Task:
    """What there is to learn from a source."""
    if not source.masks:
        return CLASSIFICATION
    from repvgg.train.segmentation import Segmentation

    return Segmentation()
