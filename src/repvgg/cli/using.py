"""Commands that use a model: eval, predict."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from repvgg.cli.flags import (
    ByEngine,
    Data,
    Draw,
    Drawn,
    Engine,
    Images,
    OnDeviceLoading,
    Output,
    Printed,
    Runnable,
    Viewed,
    Viewing,
    WhereLoading,
    say,
)
from repvgg.predict.where import Cluster

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Top-1, top-5, accuracy of each class and the confusion matrix; for masks, intersection over union of each class.

    Example: repvgg eval runs/photos/best.safetensors --data photos
    """

    model: Runnable
    data: Data
    split: Literal["val", "test"] = "val"
    """The validation split, or the test split of data that has one."""
    batch_size: int = 64
    """Images at a time; masks are made one at a time."""
    draw: Drawn = field(default_factory=Draw)
    engine: ByEngine = field(default_factory=Engine)
    viewing: Viewed = field(default_factory=Viewing)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.cli.show_results import show_evaluation
        from repvgg.deploy.load import open_model
        from repvgg.train.tasks import task_of

        device, how = self.where.chosen(), self.engine
        network = answering(open_model(self.model, how.engine, how.precision, self.batch_size, device, say), self.model)
        source = self.draw.source(self.data)
        evaluation = task_of(source).evaluate_model(
            network,
            source,
            self.split,
            batch_size=self.batch_size,
            workers=self.where.workers,
            device=device,
            views=self.viewing.views(),
        )
        show_evaluation(evaluation, source.classes, self.output.json)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Labels and probabilities of images; of a PSPNet, masks. With --data, of a whole data set, as Parquet.

    Example: repvgg predict runs/photos photo.jpg more/*.jpg
    """

    model: Runnable
    images: Images = ()
    data: Annotated[
        str, arg(help="Instead of images: any folder, or as for eval; labels are not needed; or a URL of images or Parquet.")
    ] = ""
    out: str = ""
    """For masks: folder for NAME.png (class ids), NAME_overlay.jpg and masks.json. With --data: folder for Parquet files."""
    split: str = "val"
    """Split of the data."""
    part_size: int = 1024
    """With --data: images a part; of hf-stream and wds, a part is a file of the data."""
    batch_size: int = 32
    """Images at a time; masks are made one at a time."""
    top: int = 5
    """How many labels an image."""
    explain: Literal["cam"] | None = None
    """Also write a picture of each image's evidence for its label, NAME_cam.png, beside it or in --out."""
    cluster: OmitArgPrefixes[Cluster] = field(default_factory=Cluster)
    engine: ByEngine = field(default_factory=Engine)
    viewing: Viewed = field(default_factory=Viewing)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        if self.data:
            self._whole_set()
        else:
            self._images()

    def _images(self) -> None:
        if self._light():
            return
        from repvgg.cli.show_results import show_masks, show_predictions
        from repvgg.deploy.load import open_model
        from repvgg.models.views import WHOLE
        from repvgg.models.zoo import manifest_of
        from repvgg.predict.labels import expand, predict
        from repvgg.predict.masks import class_names, predict_masks, write_masks

        at_once = min(self.batch_size, len(expand(self.images))) if self.images else self.batch_size
        device, views = self.where.chosen(), self.viewing.views()
        if self.explain:
            self._explain(device)
            return
        network = answering(open_model(self.model, self.engine.engine, self.engine.precision, at_once, device, say), self.model)
        if manifest_of(network).task == "labels" and views == WHOLE and not self.out:
            show_predictions(predict(network, self.images, self.batch_size, self.top, device), self.output.json)
            return
        answers = predict_masks(network, self.images, device, views)
        show_masks(write_masks(answers, Path(self.out), class_names(network)) if self.out else answers, self.output.json)

    def _explain(self, device: str) -> None:
        from repvgg.cli.show_results import show_predictions
        from repvgg.models.load import open_model
        from repvgg.predict.explain import explain

        if self.engine != Engine():
            raise ValueError("--explain cam looks into the network: leave out --engine and --precision")
        network = answering(open_model(self.model), self.model)
        answers = explain(network, self.images, Path(self.out) if self.out else None, self.top, device)
        show_predictions(answers, self.output.json)

    def _light(self) -> bool:
        """Answer without PyTorch where that can be; return whether it was."""
        usual = self.viewing == Viewing() and self.engine.precision == "fp32" and self.batch_size > 0
        plain = usual and not self.out and not self.explain
        if not plain or self.where.device not in ("", "cpu"):
            return False
        from repvgg.cli.show_results import show_predictions
        from repvgg.predict.light import predict_lightly

        answers = predict_lightly(self.model, self.images, self.top, self.engine.engine)
        if answers is not None:
            show_predictions(answers, self.output.json)
        return answers is not None

    def _whole_set(self) -> None:
        if self.images or not self.out:
            raise ValueError("--data D --out FOLDER: a whole data set is predicted into a folder, and no other images with it")
        from repvgg.cli.show_results import show_predicted
        from repvgg.predict.job import Job

        job = Job(
            self.model,
            self.data,
            self.out,
            split=self.split,
            engine=self.engine.engine,
            precision=self.engine.precision,
            batch_size=self.batch_size,
            top=self.top,
            part_size=self.part_size,
            views=self.viewing.views(),
            device=self.where.chosen(),
            workers=self.where.workers,
        )
        if self.cluster.ray:
            from repvgg.predict.cluster import predict_on_ray

            summary = predict_on_ray(job, self.cluster, say)
        else:
            from repvgg.predict.datasets import predict_data

            summary = predict_data(job, say)
        show_predicted(summary, self.output.json)


def answering(network: "nn.Module", name: str) -> "nn.Module":
    """Return the network. Raises ValueError for a backbone, which gives maps and neither labels nor masks."""
    from repvgg.models.zoo import manifest_of

    manifest = manifest_of(network)
    last = (manifest.layers or [{"op": "linear"}])[-1]["op"]
    if manifest.arch["num_classes"] == 0 if manifest.arch else last != "linear":
        raise ValueError(f"{name}: a backbone, which gives no labels: train a head on it first (repvgg train --init {name} ...)")
    return network
