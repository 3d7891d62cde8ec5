"""The two things that can be learnt: a label for each image, or a mask for each.

One `Task` object answers every question that differs between them.

task_of(source).evaluate_model(network, source)
task_of_model(network).kind                          # "labels" or "masks"
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.data import Images, Source
from repvgg.data.transforms import BadImages
from repvgg.models.manifest import Manifest, Preprocessing
from repvgg.models.views import WHOLE, Views
from repvgg.models.zoo import manifest_of
from repvgg.train import augment, evaluate
from repvgg.train.distributed import ALONE, World
from repvgg.train.recipes import Recipe


class Evaluation(Protocol):
    """The quality of a network. measure: the name of `score`, by which the best model is chosen; figures: all that is logged."""

    measure: ClassVar[str]

    @property
    def images(self) -> int: ...
    @property
    def confusion(self) -> Tensor: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def score(self) -> float: ...
    @property
    def figures(self) -> dict[str, float]: ...


class Task(Protocol):
    """All that training, evaluation and prediction need to know of a task. share: the name of what `right` returns."""

    kind: Literal["labels", "masks"]
    share: str

    def prepared(self, source: Source, recipe: Recipe) -> Source:
        """Return the source as this recipe wants it. Raises ValueError for a recipe that is for something else."""
        ...

    def check(self, model: nn.Module, source: Source) -> None:
        """Raise ValueError where a model and a source do not belong together: in kind, channels or number of classes."""
        ...

    def check_views(self, views: Views) -> None:
        """Raise ValueError for views that a model of this kind cannot be shown an image in."""
        ...

    def train_transform(self, recipe: Recipe, preprocessing: Preprocessing) -> nn.Module: ...

    def loss(self, outputs: Any, target: Tensor, recipe: Recipe) -> Tensor:
        """Return the loss of what the network returns in train mode."""
        ...

    def right(self, outputs: Any, target: Tensor) -> Tensor:
        """Return the share that is recognised."""
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
        """Yield this process's share of the images to evaluate on, normalised, and what is true of them."""
        ...

    def evaluate(
        self, network: Callable[[Tensor], Tensor], data: Iterable[tuple[Tensor, Tensor]], num_classes: int, world: World = ALONE
    ) -> Evaluation: ...

    def restored(self, confusion: Tensor, **facts: Any) -> Evaluation:
        """Return what `evaluate` returned, from its fields."""
        ...

    def evaluate_model(
        self,
        model: nn.Module,
        source: Source,
        split: str = "val",
        *,
        batch_size: int = 64,
        workers: int = 0,
        device: str = "cpu",
        views: Views = WHOLE,
        bad: BadImages | None = None,
    ) -> Evaluation:
        """Evaluate a model or an engine on a split of a source, with the preprocessing that it carries.

        views: how a photo is shown to a network that gives masks, which takes photos one by one whatever the batch size. bad: list
        images that cannot be read there instead of raising `ImageError`. Raises ValueError where `check` or `check_views` does.
        """
        ...


class Classification:
    """A label for each image (see `Task`)."""

    kind: Literal["labels", "masks"] = "labels"
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
        if recipe.image_size:
            return replace(source, preprocessing=source.preprocessing.sized(recipe.image_size))
        return source

    def check(self, model: nn.Module, source: Source) -> None:
        manifest = manifest_of(model)
        if manifest.task != self.kind:
            raise ValueError(f"{source.name} has labels, and a PSPNet gives masks: --data camvid:ROOT or cityscapes:ROOT")
        evaluate.check_fit(manifest, source)

    def check_views(self, views: Views) -> None:
        if views != WHOLE:
            raise ValueError("this model gives labels, not masks: --slide, --scales and --flip are for a PSPNet")

    def loss(self, outputs: Any, target: Tensor, recipe: Recipe) -> Tensor:
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
        return sum((recipe.auxiliary * self.loss(head, target, recipe) for head in auxiliary), loss)

    def right(self, outputs: Any, target: Tensor) -> Tensor:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return (logits.argmax(1) == target).float().mean()  # type: ignore[no-any-return]

    def restored(self, confusion: Tensor, **facts: Any) -> Evaluation:
        return evaluate.Accuracy(**facts, confusion=confusion)

    def evaluate_model(
        self,
        model: nn.Module,
        source: Source,
        split: str = "val",
        *,
        batch_size: int = 64,
        workers: int = 0,
        device: str = "cpu",
        views: Views = WHOLE,
        bad: BadImages | None = None,
    ) -> Evaluation:
        self.check_views(views)
        self.check(model, source)
        return evaluate.evaluate_model(model, replace(source, val=source.split(split)), batch_size, workers, device, bad)


CLASSIFICATION = Classification()


def task_of(source: Source) -> Task:
    """Return the task that a source has examples of."""
    return _task("masks" if source.masks else "labels")


def task_of_model(model: nn.Module | Manifest) -> Task:
    """Return the task that a model, an engine's runner or a manifest is for. Raises ValueError for a network without a manifest."""
    return _task((model if isinstance(model, Manifest) else manifest_of(model)).task)


def _task(kind: Literal["labels", "masks"]) -> Task:
    if kind == "labels":
        return CLASSIFICATION
    from repvgg.train.segmentation import SEGMENTATION  # it imports much that labels do not need

    return SEGMENTATION
