"""Commands that use a model: eval, predict."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

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
from repvgg.predict.actors import Cluster


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure top-1, top-5, accuracy per class and the confusion matrix; for masks, intersection over union per class.

    Example: repvgg eval runs/photos/best.safetensors --data photos
    """

    model: Runnable
    data: Data
    split: Literal["val", "test", "all"] = "val"
    """The validation split, the test split of data that has one, or all images."""
    batch_size: int = 64
    """Images at a time; masks are made one at a time."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """stop: at an image that cannot be read. skip: name such images and leave them out."""
    draw: Drawn = field(default_factory=Draw)
    engine: ByEngine = field(default_factory=Engine)
    viewing: Viewed = field(default_factory=Viewing)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        from repvgg.api.using import evaluate
        from repvgg.cli.show_results import show_evaluation

        evaluation = evaluate(
            self.model,
            self.data,
            split=self.split,
            batch_size=self.batch_size,
            views=self.viewing.views(),
            on_bad_image=self.on_bad_image,
            log=say,
            **vars(self.draw),
            **vars(self.engine),
            **vars(self.where),
        )
        show_evaluation(evaluation, self.output.json)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict labels and probabilities of images; a PSPNet's masks; with --data, a data set as Parquet.

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
    """With --data: images per part; with hf-stream and wds, a part is a data file."""
    batch_size: int = 32
    """Images at a time; masks are made one at a time."""
    top: int = 5
    """Labels for each image."""
    explain: Literal["cam"] | None = None
    """Also write a picture of each image's evidence for its label, NAME.cam.png, beside it or in --out."""
    cluster: OmitArgPrefixes[Cluster] = field(default_factory=Cluster)
    engine: ByEngine = field(default_factory=Engine)
    viewing: Viewed = field(default_factory=Viewing)
    where: OnDeviceLoading = field(default_factory=WhereLoading)
    output: Printed = field(default_factory=Output)

    def run(self) -> None:
        if self.data:
            self._whole_set()
        elif self.cluster != Cluster() or self.where.workers or (self.split, self.part_size) != (Predict.split, Predict.part_size):
            raise ValueError("--split, --part-size, --workers and --ray are for a whole data set: --data D --out FOLDER")
        else:
            self._images()

    def _images(self) -> None:
        from repvgg.api.using import predictions
        from repvgg.cli.show_results import show_answers

        answers = predictions(
            self.model,
            self.images,
            top=self.top,
            out=self.out,
            batch_size=self.batch_size,
            views=self.viewing.views() if self.viewing != Viewing() else None,
            explain=self.explain or "",
            device=self.where.device,
            log=say,
            **vars(self.engine),
        )
        show_answers(answers, self.output.json)

    def _whole_set(self) -> None:
        if self.images or not self.out:
            raise ValueError("--data D --out FOLDER: --data needs a folder for its predictions, and takes no other images")
        if not self.cluster.ray and self.cluster != Cluster():
            raise ValueError("--concurrency and --gpus are for --ray")
        if self.cluster.ray and self.where.workers:
            raise ValueError("--workers is for one process: with --ray the cluster decodes")
        if self.explain:
            raise ValueError(f"--explain {self.explain} is for images that are named, not for those of --data")
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
