"""The commands. No logic of its own: each parses its words (tyro), calls one function and prints what it returns.

Exit codes: 0 done, 2 bad input (one line says what and how to mend it), 130 and 143 stopped by Ctrl-C and SIGTERM.
REPVGG_DEBUG=1 shows the traceback of an error.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from repvgg.predict.where import Cluster
from repvgg.train.recipes import Keeping, Recipe, get_recipe
from repvgg.version import __version__

DESCRIPTION = f"repvgg {__version__}: train a multi-branch RepVGG, fold it exactly into plain 3x3 convolutions, use it."
Keys = Literal["repvgg", "official", "timm", "mmpretrain"]


def demo(out: Path = Path("demo"), seed: int = 0, web: bool = False) -> None:
    """The whole road on embedded data, in about a minute: train, fold, verify, time, predict, and a page to look at.

    Args:
        out: folder for the model files and the page (index.html).
        seed: of the run.
        web: then run the trained model in the browser, both forms side by side; as repvgg web does with any model.
    """
    from repvgg.demo import run

    if not web or not (out / "index.html").exists():
        run(out, seed)
    if web:
        run_web(str(out / "run" / "last.safetensors"), (str(out / "scans"),), out / "web")


def run_web(
    model: Positional[str],
    images: Positional[tuple[str, ...]] = (),
    out: Path = Path("web"),
    runtime: Path | None = None,
    port: int = 8000,
    serve: bool = True,
) -> None:
    """A page that runs a model in the browser on the visitor's images, training form and deploy form side by side.

    Args:
        model: a model file in training form.
        images: files, folders and globs: examples on the page.
        out: folder for the page and all that it needs; any static web server will do.
        runtime: folder with onnxruntime-web's files; by default npm fetches them, once.
        port: of the local server.
        serve: the page to this machine, until Ctrl-C.
    """
    from repvgg.models.zoo import load
    from repvgg.web.app import build
    from repvgg.web.app import serve as run

    build(load(model), out, images, runtime, _say)
    if serve:
        run(out, port, _say)


def info(model: Positional[str] = "", graph: Path | None = None, json: bool = False) -> None:
    """The family at a glance, one model layer by layer, or the operators of an exported file.

    Args:
        model: a model's name or a model file; empty: the family.
        graph: an exported file (.onnx, OpenVINO's .xml, ncnn's .param), to list its operators.
        json: print JSON instead of a table.
    """
    from repvgg.info import show, show_graph

    show_graph(graph, json) if graph else show(model, json)


def recipe(name: Positional[str] = "", json: bool = False) -> None:
    """The recipes, or one of them fully resolved.

    Args:
        name: a recipe; empty: list them.
        json: print JSON instead of a table.
    """
    from repvgg.info import show_recipe, show_recipes

    show_recipe(name, json) if name else show_recipes(json)


@dataclass(frozen=True)
class Settings(Recipe):
    """A recipe as flags, not checked yet: tyro would make a box of what a recipe complains of in a line."""

    def __post_init__(self) -> None:
        pass


def _train(default: Recipe) -> Callable[..., None]:
    def train(
        data: str,
        out: Path,
        arch: str = "",
        init: str = "",
        recipe: str = "",
        settings: OmitArgPrefixes[Settings] = Settings(**asdict(default)),  # noqa: B008 - made anew with each default
        keeping: OmitArgPrefixes[Keeping] = Keeping(),  # noqa: B008 - frozen
        width: float = 1.0,
        small_input: bool | None = None,
        block: str = "",
        limit: int | None = None,
        seed: int = 0,
        device: str = "",
        workers: int = 0,
    ) -> None:
        """Train a model on images, evaluate it every epoch, keep the best and the last; go on with a run that was stopped.

        Args:
            arch: a model's name (see repvgg info); not needed with --init.
            init: a model file, or a name for its pretrained weights, to start from; the head is new if the classes are.
            data: digits, a folder with train/ and val/, cifar10[:ROOT], hf:NAME_OR_PATH, hf-stream:NAME_OR_PATH, wds:SHARDS; or
                with masks, for a PSPNet, camvid:ROOT, cityscapes:ROOT.
            out: run folder for models, recipe and metrics.
            recipe: light, heavy, cifar, finetune, demo, pspnet or camvid; empty: what suits the data. Its fields are flags, shown
                with its values.
            settings: the recipe's fields.
            keeping: when state is saved, and what is done with a run that is there already.
            width: scales the width multipliers a and b.
            small_input: stem and first stage at stride 1; by default for images of at most 64 pixels.
            block: the structure of each layer in training form; by default the model's own. (An unknown one lists them all.)
            limit: at most this many images of each split, drawn with the seed.
            seed: of weights, order and augmentation.
            device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
            workers: processes that load images; 0 loads in the main one.
        """
        from repvgg.data import open_source
        from repvgg.train.distributed import local_device
        from repvgg.train.loop import train as run

        options: dict[str, Any] = {"block": block} if block else {}
        if width != 1:
            options["width"] = width
        if small_input is not None:
            options["small_input"] = small_input
        if not arch and not init:
            raise ValueError(
                "which model? --arch NAME for a new one (see repvgg info), or --init FILE to start from trained weights"
            )
        checked = Recipe(**asdict(settings))
        where = local_device(_device(device))
        source = open_source(data).limited(limit, seed)
        result = run(
            arch, source, checked, out, init=init, seed=seed, device=where, workers=workers, keeping=keeping, log=_say, **options
        )
        if _process() == "0":
            best, last = (f"{x.score:.2%}" for x in (result.best, result.last))
            name = {"top1": "top-1", "mean_iou": "mean IoU"}[result.best.measure]
            print(f"best val {name} {best}, last {last}, in {result.seconds / 60:.1f} min: {out}")

    return train


def evaluate(
    model: Positional[str],
    data: str,
    split: Literal["val", "test"] = "val",
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    slide: bool = False,
    scales: str = "1",
    flip: bool = False,
    device: str = "",
    workers: int = 0,
    engine: str = "",
    precision: str = "fp32",
    json: bool = False,
) -> None:
    """Top-1, top-5, accuracy of each class and the confusion matrix; or of masks, intersection over union of each class.

    Args:
        model: a model file, hf:USER/NAME, a name for its pretrained weights, or an exported file or its folder.
        data: digits, a folder with train/ and val/, cifar10[:ROOT], hf:NAME_OR_PATH, hf-stream:NAME_OR_PATH, wds:SHARDS,
            camvid:ROOT or cityscapes:ROOT.
        split: the validation split, or the test split of data that has one.
        batch_size: images at a time; masks are made one at a time.
        limit: at most this many images, drawn with the seed.
        seed: of the draw.
        slide: of masks: in windows of the training crop's size, which overlap, instead of the whole image.
        scales: of masks: of the image, several with commas, averaged: 0.75,1,1.25.
        flip: of masks: average with the mirrored image.
        device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
        workers: processes that load images; 0 loads in the main one.
        engine: what runs it: auto (the fastest here) or a name, as in repvgg bench; empty: PyTorch, or the exported file's own.
        precision: of the engine: fp32, tf32, bf16 or fp16.
        json: print JSON instead of tables.
    """
    from repvgg.data import open_source
    from repvgg.deploy.load import open_model
    from repvgg.info import show_accuracy, show_overlap
    from repvgg.train.evaluate import evaluate_model

    network = open_model(model, engine, precision, batch_size, _device(device), _say)
    source = open_source(data).limited(limit, seed)
    if source.masks:
        from repvgg.train.segmentation import Segmentation

        how: Any = {"workers": workers, "device": _device(device), "views": _views(slide, scales, flip)}
        overlap = Segmentation().evaluate_model(network, source, split, **how)
        show_overlap(overlap, source.classes, json)
        return
    if _asks_for_masks("", slide, scales, flip):
        raise ValueError(f"--slide, --scales and --flip are for masks, {source.name} has labels")
    source = replace(source, val=source.split(split))
    show_accuracy(evaluate_model(network, source, batch_size, workers, _device(device)), source.classes, json)


def _views(slide: bool, scales: str, flip: bool) -> Any:
    from repvgg.models.views import Views

    try:
        sizes = tuple(float(scale) for scale in scales.split(","))
    except ValueError:
        raise ValueError(f"--scales {scales}: numbers with commas, as in 0.75,1,1.25") from None
    return Views(slide, sizes, flip)


def _asks_for_masks(out: str, slide: bool, scales: str, flip: bool) -> bool:
    return bool(out) or slide or scales != "1" or flip


def convert(source: Positional[Path], target: Positional[Path], to_keys: Keys | None = None) -> None:
    """Training form to deploy form, verified; or, with --to-keys, the same form in another implementation's keys.

    Args:
        source: our file, or an official, timm or mmpretrain checkpoint.
        target: the file to write (.safetensors, or .pth for a bare PyTorch state dict).
        to_keys: keep the form and spell the state dict as official, timm, mmpretrain or repvgg do.
    """
    from repvgg.models.convert import convert as run

    run(source, target, to_keys, log=_say)


def predict(
    model: Positional[str],
    images: Positional[tuple[str, ...]] = (),
    data: str = "",
    split: str = "val",
    batch_size: int = 32,
    top: int = 5,
    out: str = "",
    part_size: int = 1024,
    cluster: OmitArgPrefixes[Cluster] = Cluster(),  # noqa: B008 - frozen
    slide: bool = False,
    scales: str = "1",
    flip: bool = False,
    device: str = "",
    workers: int = 0,
    engine: str = "",
    precision: str = "fp32",
    json: bool = False,
) -> None:
    """Labels and probabilities of images; or of a PSPNet, masks. With --data, of a whole data set, as Parquet.

    Args:
        model: a model file, hf:USER/NAME, a name for its pretrained weights, or an exported file or its folder.
        images: files, folders and globs.
        data: instead of images: any folder, hf:NAME_OR_PATH, hf-stream:NAME_OR_PATH, wds:SHARDS, or as for eval; no labels are
            needed; or a URL of images or Parquet files, such as s3://BUCKET/PHOTOS. The same command goes on where it was.
        split: of the data.
        batch_size: images at a time; masks are made one at a time.
        top: how many labels an image.
        out: of masks: folder for NAME.png (class ids), NAME_overlay.jpg and masks.json. With --data: folder for Parquet files, with
            --ray also a URL.
        part_size: with --data: images a part; of hf-stream and wds, a part is a file of the data.
        cluster: where a whole data set is predicted.
        slide: of masks: in windows of the training crop's size, which overlap, instead of the whole image.
        scales: of masks: of the image, several with commas, averaged: 0.75,1,1.25.
        flip: of masks: average with the mirrored image.
        device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
        workers: with --data: processes that decode images; 0 decodes in the main one.
        engine: what runs it: auto (the fastest here) or a name, as in repvgg bench; empty: PyTorch, or the exported file's own.
        precision: of the engine: fp32, tf32, bf16 or fp16.
        json: print one JSON object an image; with --data, one in the end.
    """
    if data:
        if images or not out:
            raise ValueError("--data D --out FOLDER: a whole data set is predicted into a folder, and no other images with it")
        from repvgg.info import show_predicted
        from repvgg.predict.job import Job

        job = Job(
            model,
            data,
            out,
            split=split,
            engine=engine,
            precision=precision,
            batch_size=batch_size,
            top=top,
            part_size=part_size,
            views=_views(slide, scales, flip),
            device=_device(device),
            workers=workers,
        )
        if cluster.ray:
            from repvgg.predict.cluster import predict_on_ray

            show_predicted(predict_on_ray(job, cluster, _say), json)
            return
        from repvgg.predict.datasets import predict_data

        show_predicted(predict_data(job, _say), json)
        return
    from repvgg.deploy.load import open_model
    from repvgg.info import show_masks, show_predictions
    from repvgg.models.zoo import manifest_of
    from repvgg.predict.labels import expand
    from repvgg.predict.labels import predict as run

    at_once = min(batch_size, len(expand(images))) if images else batch_size
    network = open_model(model, engine, precision, at_once, _device(device), _say)
    if manifest_of(network).task == "labels" and not _asks_for_masks(out, slide, scales, flip):
        show_predictions(run(network, images, batch_size, top, _device(device)), json)
        return
    from repvgg.predict.masks import class_names, predict_masks, write_masks

    answers = predict_masks(network, images, _device(device), _views(slide, scales, flip))
    show_masks(write_masks(answers, Path(out), class_names(network)) if out else answers, json)


def export(
    model: Positional[str],
    to: Literal["onnx", "openvino", "ncnn", "mnn", "pt2", "aotinductor"],
    out: Path,
    batch_size: int = 0,
    any_size: bool = False,
    pixels: bool = False,
    image_size: tuple[int, int] | None = None,
    data: str = "",
    images: int = 8,
) -> None:
    """A file of another runtime: folded, written, loaded back, and compared with PyTorch before it is kept.

    Args:
        model: a model file, or a name for its pretrained weights.
        to: the kind of file; pt2 is torch.export's, aotinductor the same compiled for this kind of processor.
        out: folder for the file and its report (.json).
        batch_size: images a run; 0 for any number.
        any_size: take images of any height and width.
        pixels: take uint8 pixels: mean and deviation go into the graph.
        image_size: take uint8 pixels of this height and width: resizing and cropping go into the graph too.
        data: compare on images of its validation split, instead of random ones.
        images: how many of them.
    """
    from repvgg.deploy.export import Shape, real_images
    from repvgg.deploy.export import export as run
    from repvgg.models.zoo import open_model

    network = open_model(model)
    shape = Shape(batch_size or None, any_size, pixels, image_size)
    run(network, to, out, Path(model).stem, shape, real_images(network, data, images, shape) if data else None, _say)


def push(model: Positional[Path], repo: Positional[str], license: str = "", private: bool = False, message: str = "") -> None:
    """Publish a model file on the Hugging Face hub, with a card that says what was measured. Then hf:REPO stands for it.

    Args:
        model: a model file; the summary of its run, if that lies beside it, goes into the card.
        repo: USER/NAME; made if it is not there.
        license: an identifier of the hub's, such as mit or apache-2.0.
        private: make the repository a private one.
        message: of the commit.
    """
    from repvgg.models.push import push_to_hub

    print(push_to_hub(model, repo, license=license, private=private, message=message))


def quantize(
    model: Positional[str],
    data: str,
    to: Literal["openvino", "onnx"],
    out: Path,
    images: int = 300,
    bias_correction: Literal["none", "fast", "full"] = "fast",
    equalise: bool = False,
    keep: tuple[int, ...] = (),
    max_drop: float | None = None,
    qat_epochs: int = 0,
    qat_lr: float = 0.001,
    limit: int | None = None,
    seed: int = 0,
    device: str = "",
    json: bool = False,
) -> None:
    """INT8, calibrated on real images; with the accuracy before and after, the layers that hurt, and the speed.

    Args:
        model: a model file, or a name for its pretrained weights.
        data: calibrated on its training split, evaluated on the whole of its validation split.
        to: openvino or onnx.
        out: folder for the file and its report (.json).
        images: to calibrate on.
        bias_correction: of what rounding weights does to a layer's mean.
        equalise: scale channels first, so that weights have like ranges; exact.
        keep: numbers of layers to leave in float; 0 -1 for the first and the last.
        max_drop: of top-1, as a fraction: leave as many layers in float as that takes.
        qat_epochs: first insert batch norms and train this long with weights and activations rounded.
        qat_lr: learning rate of that, at its start.
        limit: at most this many images of each split, drawn with the seed.
        seed: of the draw.
        device: to train on: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
        json: print JSON instead of tables.
    """
    from repvgg.data import open_source
    from repvgg.deploy.quantize import Quantization
    from repvgg.deploy.quantize import quantize as run
    from repvgg.info import show_quantization
    from repvgg.models.zoo import open_model

    settings = Quantization(images, bias_correction, equalise, keep, max_drop, qat_epochs, qat_lr)
    source = open_source(data).limited(limit, seed)
    show_quantization(run(open_model(model), source, to, out, Path(model).stem, settings, _device(device), _say), json)


def _prune(default: Recipe) -> Callable[..., None]:
    def prune(
        model: Positional[str],
        data: str,
        out: Path,
        keep: float = 0.5,
        recipe: str = "",
        settings: OmitArgPrefixes[Settings] = Settings(**asdict(default)),  # noqa: B008 - made anew with each default
        keeping: OmitArgPrefixes[Keeping] = Keeping(),  # noqa: B008 - frozen
        engine: str = "eager",
        limit: int | None = None,
        seed: int = 0,
        device: str = "",
        workers: int = 0,
        json: bool = False,
    ) -> None:
        """Take channels out of a RepVGG and train what is left; with accuracy, cost and speed before and after.

        Args:
            model: a model file, or a name for its pretrained weights; of a training form all branches are pruned together.
            data: what it is trained on, as for train.
            out: run folder, with the best model in deploy form too (deploy.safetensors), and the figures (pruning.json).
            keep: share of each layer's channels that stay.
            recipe: as for train; empty: what suits the data. Its fields are flags, shown with its values.
            settings: the recipe's fields.
            keeping: when state is saved, and what is done with a run that is there already.
            engine: that the speeds are measured with, as in repvgg bench.
            limit: at most this many images of each split, drawn with the seed.
            seed: of order and augmentation.
            device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
            workers: processes that load images; 0 loads in the main one.
            json: print JSON instead of a table.
        """
        from repvgg.data import open_source
        from repvgg.deploy.prune import prune as run
        from repvgg.info import show_pruning
        from repvgg.models.zoo import open_model

        source = open_source(data).limited(limit, seed)
        report = run(
            open_model(model),
            source,
            out,
            keep,
            Recipe(**asdict(settings)),
            engine=engine,
            seed=seed,
            device=_device(device),
            workers=workers,
            keeping=keeping,
            log=_say,
        )
        show_pruning(report, json)

    return prune


def bench(
    models: Positional[tuple[str, ...]],
    engines: str = "eager",
    precision: str = "fp32",
    batch_size: str = "32",
    rounds: int = 5,
    batches: int = 10,
    warmup: int = 5,
    form: Literal["deploy", "training", "both", "space_to_batch"] = "deploy",
    threads: int | None = None,
    channels_last: bool = True,
    input_size: int | None = None,
    allow_unfolded: bool = False,
    device: str = "",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Speed of models, engines and precisions, taking turns, with spread and ratios to the first.

    Args:
        models: names; all are folded before they are timed, comparators too.
        engines: eager, compile, aotinductor, onnxruntime, ncnn, mnn, openvino, native; several with commas, or all that are
            installed.
        precision: fp32, tf32, bf16, fp16; several with commas.
        batch_size: images a batch, several with commas; halved, with a word, where memory runs out.
        rounds: in each, every candidate has its turn.
        batches: timed batches a turn. (The paper: 50.)
        warmup: batches before the first round. (The paper: 50.)
        form: the deploy form, the training form, or both; or the deploy form with dilated convolutions run as plain ones.
        threads: of the CPU; by default PyTorch's own number.
        channels_last: memory format NHWC for the PyTorch engines.
        input_size: height and width; by default each model's own.
        allow_unfolded: time a model that does not fold entirely, and mark it.
        device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
        out: write the figures as JSON, with the machine.
        json: print the JSON instead of a table.
    """
    from repvgg.bench.models import bench as run
    from repvgg.bench.models import candidates
    from repvgg.info import show_reports

    device = _device(device)
    forms = ("deploy", "training") if form == "both" else (form,)
    wanted = candidates(models, engines.split(","), precision.split(","), forms, device, _say)
    reports = [
        run(
            wanted,
            batch_size=size,
            rounds=rounds,
            batches=batches,
            warmup=warmup,
            threads=threads,
            channels_last=channels_last,
            device=device,
            input_size=(3, input_size, input_size) if input_size else None,
            allow_unfolded=allow_unfolded,
            log=_say,
        )
        for size in _numbers(batch_size)
    ]
    show_reports(reports, out, json)


def _ablate(default: Recipe) -> Callable[..., None]:
    def ablate(
        data: str,
        out: Path,
        arch: str = "repvgg_b0",
        variants: str = "",
        seeds: int = 3,
        recipe: str = "",
        settings: OmitArgPrefixes[Settings] = Settings(**asdict(default)),  # noqa: B008 - made anew with each default
        width: float = 1.0,
        small_input: bool | None = None,
        limit: int | None = None,
        device: str = "",
        workers: int = 0,
        json: bool = False,
    ) -> None:
        """Tables 6 and 7 of the paper on any data: train every variant of a block with every seed, set them side by side.

        What is finished is kept and what was begun goes on, so that it may be stopped and started at will. Start it several times
        on one folder, on one machine or many that share it, and they divide the work.

        Args:
            data: digits, a folder with train/ and val/, cifar10[:ROOT], hf:NAME_OR_PATH, hf-stream:NAME_OR_PATH or wds:SHARDS.
            out: folder for a run folder per cell, and for the tables.
            arch: the member that the variants are of.
            variants: several with commas; by default the eleven of Tables 6 and 7. (An unknown one lists them all.)
            seeds: how many, from 0 on. More may follow later.
            recipe: as for train; empty: what suits the data. Its fields are flags, shown with its values.
            settings: the recipe's fields.
            width: scales the width multipliers a and b.
            small_input: stem and first stage at stride 1; by default for images of at most 64 pixels.
            limit: at most this many images of each split, the same for all.
            device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
            workers: processes that load images; 0 loads in the main one.
            json: print the JSON instead of tables.
        """
        from repvgg.paper.ablation import ablate as run
        from repvgg.paper.grid import Grid
        from repvgg.paper.report import keep, show
        from repvgg.paper.result import Settings as How

        device = _device(device)
        grid = Grid(
            out=out,
            data=data,
            recipe=Recipe(**asdict(settings)),
            arch=arch,
            width=width,
            small_input=small_input,
            limit=limit,
            variants=tuple(variants.split(",")) if variants else (),
            seeds=seeds,
            device=device,
            workers=workers,
        )
        how = How(data=data, device=device, out=out, log=_say)
        result = run(grid, how)
        keep("ablation", result, how)
        show("ablation", result, how, json)

    return ablate


def paper(
    part: Positional[str],
    data: str = "",
    quick: bool = False,
    models: str = "",
    engine: str = "",
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32",
    batch_size: int | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    channels_last: bool = True,
    device: str = "",
    workers: int = 0,
    out: Path = Path("paper"),
    json: bool = False,
) -> None:
    """What the paper reports, beside what this machine measures: tables, figures and a page.

    Finished speeds are kept in OUT/speeds.json, so that an interrupted run goes on where it was.

    Args:
        part: table1, ..., table8, figure1, ..., figure4, forms (training form against deploy form), winograd; or all.
        data: what tables 6 and 7 train on, as for train (without it, all leaves them out); or photos with masks for table 8
            (without them its models are only timed).
        quick: minutes instead of tens of minutes: small batches, few rounds, a handful of models; marked so.
        models: of tables 4, 5 and 8, figure 1 and forms, several with commas; by default all.
        engine: eager, compile, onnxruntime or openvino; by default eager, for winograd all that are installed.
        precision: of weights and activations.
        batch_size: images a batch; by default 128 on CUDA (as in the paper) and 8 elsewhere.
        rounds: in which the candidates take turns.
        threads: of the CPU; by default PyTorch's own number.
        channels_last: memory format NHWC for the PyTorch engines.
        device: cpu, cuda, cuda:1, ...; empty: a GPU if there is one.
        workers: processes that load images to train on; 0 loads in the main one.
        out: folder for JSON, PNG, SVG and, for all, index.html.
        json: print the JSON instead of tables.
    """
    from repvgg.paper.report import paper as run
    from repvgg.paper.result import Settings

    settings = Settings(
        data=data,
        workers=workers,
        models=tuple(models.split(",")) if models else (),
        engine=engine,
        precision=precision,
        batch_size=batch_size,
        rounds=rounds,
        threads=threads,
        channels_last=channels_last,
        device=_device(device),
        quick=quick,
        out=out,
        log=_say,
    )
    run(part, settings, json)


def main(argv: Sequence[str] | None = None) -> None:
    """The `repvgg` command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where a reader that has left is noticed
    except KeyboardInterrupt as stopped:
        _fail(str(stopped) or "stopped; what was saved last is whole", 128 + getattr(stopped, "signal", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has left: end quietly, as rich does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("REPVGG_DEBUG"):
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        code = 1 if isinstance(error, ConnectionError) else 2  # another process of a distributed run is gone
        _fail(f"this needs {missing}: pip install 'repvgg[all]'" if missing else str(error), code)


def _run(words: list[str]) -> None:
    if words in (["--version"], ["-V"]):
        print(f"repvgg {__version__}")
        return
    default = _default_recipe(words)
    commands: dict[str, Callable[..., Any]] = {
        "demo": demo,
        "info": info,
        "recipe": recipe,
        "train": _train(default),
        "eval": evaluate,
        "convert": convert,
        "predict": predict,
        "export": export,
        "web": run_web,
        "push": push,
        "quantize": quantize,
        "prune": _prune(default),
        "bench": bench,
        "ablate": _ablate(default),
        "paper": paper,
    }
    tyro.extras.subcommand_cli_from_dict(commands, prog="repvgg", description=DESCRIPTION, args=words, sort_subcommands=False)


def _default_recipe(words: list[str]) -> Recipe:
    """The recipe whose values the flags of `train`, `prune` and `ablate` start from: the one named, or what suits the data."""
    if words[:1] not in (["train"], ["prune"], ["ablate"]):
        return Recipe()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--init", default="")
    try:
        named, _ = parser.parse_known_args(words[1:])
    except argparse.ArgumentError:  # tyro will say it better
        return Recipe()
    if named.recipe or not named.data or "--help" in words or "-h" in words:
        return get_recipe(named.recipe or ("finetune" if named.init else "light"))
    from repvgg.data import open_source

    source = open_source(named.data)
    if named.init and not source.masks:
        return get_recipe("finetune")
    name = source.recipe
    _say(f"recipe: {name}")
    return get_recipe(name)


def _device(name: str) -> str:
    """The device of that name, by default the first one. Raises ValueError for one that this machine lacks."""
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = [*(["cuda", *gpus] if gpus else []), "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if name and name not in devices:
        raise ValueError(f"no device {name!r} here: {', '.join(devices)}")
    return name or devices[0]


def _numbers(words: str) -> list[int]:
    """ "1,32" as numbers. Raises ValueError for anything else."""
    if not all(word.strip().isdigit() for word in words.split(",")):
        raise ValueError(f"{words!r}: numbers with commas between them are needed, such as 1,32")
    return [int(word) for word in words.split(",")]


def _process() -> str:
    """Which one this is of those that torchrun started."""
    return os.environ.get("RANK", "0")


def _say(line: str) -> None:
    """Remarks go to stderr, so that stdout holds results alone."""
    print(line, file=sys.stderr, flush=True)


def _fail(reason: str, code: int) -> None:
    _say(f"repvgg{'' if _process() == '0' else f' (process {_process()})'}: {reason}")
    sys.exit(code)


if __name__ == "__main__":
    main()
