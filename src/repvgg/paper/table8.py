"""Table 8: PSPNet on RepVGG and ResNet, in both dilation plans and both forms; and dilated convolutions run as plain ones."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.bench.models import Candidate
from repvgg.data import open_source
from repvgg.deploy import engines
from repvgg.deploy.space_to_batch import space_to_batch
from repvgg.measure.timing import Ratio, Times, interleave, ratio, synchroniser
from repvgg.models.load import load
from repvgg.models.names import PSPNETS, resolve_name
from repvgg.models.zoo import manifest_of
from repvgg.paper.numbers import TABLE8, SegmentationRow
from repvgg.paper.result import NothingChosenError, PaperSettings, Result, Table, interval
from repvgg.paper.speeds import Speed, measure, over, significant

REFERENCE = "pspnet_resnet50"
QUICK = ("pspnet_repvgg_b1g2_fast", "pspnet_resnet50", "pspnet_repvgg_b1g2")
FORMS = ("deploy", "training", "space_to_batch")
PRINTED = {row.model: row for row in TABLE8}
SIDE, CPU_SIDE, QUICK_SIDE = 713, 353, 129  # pixels: the paper's; on a CPU, which takes seconds for one of those; in a hurry
LAYERS = 4  # of stage 4, which dilate in the fast plan
SHAPE, QUICK_SHAPE = (512, 90, 90), (128, 45, 45)  # of their maps: RepVGG-B1's at 713 pixels, and smaller ones


@dataclass(frozen=True)
class Dilated:
    """Four 3x3 layers of stage 4 in one engine: dilated by 2, the same by space-to-batch, and plain ones, which compute something
    else. error: of the second against the first, relative. gain: its speed over theirs. Both are None where an engine (the native
    one) runs convolutions alone: it takes dilated layers apart itself."""

    engine: str
    seconds: dict[str, list[float]]
    gain: Ratio | None
    plain: Ratio
    error: float | None


def run(settings: PaperSettings) -> Result:
    scaled = _scaled(settings)
    models = chosen(settings)
    trained = bool(settings.data) and open_source(settings.data).masks
    if settings.data and not trained:
        settings.log(f"{settings.data} has labels, no masks: the PSPNets are timed, and none is trained")
    engine = settings.one_engine
    reference = Candidate(REFERENCE, engine, settings.precision)
    candidates = {(m, form): Candidate(m, engine, settings.precision, form) for m in models for form in FORMS}
    speeds = dict(zip(candidates, measure([(c, reference) for c in candidates.values()], scaled), strict=True))
    dilated = [found for name in _engines(settings) if (found := _dilated_if_it_can(name, scaled))]
    overlaps = {model: _trained(model, settings) for model in models} if trained else {}
    side, batch = scaled.input_size, scaled.protocol.batch_size
    return Result(
        "Table 8: semantic segmentation",
        [_speeds(models, speeds), _forms(models, speeds), _by_engine(dilated), *_overlaps(overlaps)],
        _why(dilated),
        {
            "speeds": {f"{m}, {form}": {**asdict(s), **interval(s.ratio)} for (m, form), s in speeds.items()},
            "dilated": [{**asdict(d), "gain": d.gain and interval(d.gain), "plain": interval(d.plain)} for d in dilated],
            "overlaps": overlaps,
        },
        how=f"The paper's speeds are those of one GTX 1080Ti in fp32 on images of {SIDE} x {SIDE} at batch 16, ours those of "
        f"{engine} in {settings.precision} on {settings.where}, on images of {side} x {side} at batch {batch}: medians of "
        f"{scaled.protocol.rounds} rounds, in which each took turns with PSPNet on ResNet-50. Everything was folded by the same "
        "reparameterize. The ResNets are timm's, dilated, with one 7x7 for a stem. The paper's mIoU and pixel accuracy are those "
        "on Cityscapes; " + ("ours are below." if overlaps else "ours are measured where --data names photos with masks."),
    )


def chosen(settings: PaperSettings) -> list[str]:
    """Return the PSPNets that were asked for, in the table or not; else the table's, or a quick look's own choice."""
    names = [resolve_name(name) for name in settings.models]
    found = [name for name in names if name in PSPNETS]
    if names and not found:
        raise NothingChosenError(f"none of {', '.join(names)} is a PSPNet: its models are {', '.join(PRINTED)}")
    return found or list(QUICK if settings.quick else PRINTED)


def _scaled(settings: PaperSettings) -> PaperSettings:
    """The paper's 16 images of 713 pixels on CUDA; on a CPU one, and a smaller one."""
    cuda = settings.device.startswith("cuda")
    side = settings.input_size or (SIDE if cuda else QUICK_SIDE if settings.quick else CPU_SIDE)
    return replace(settings, batch_size=settings.batch_size or (16 if cuda else 1), input_size=side)


# ------------------------------------------------------------------------------------------------------------------- tables


def _speeds(models: Sequence[str], speeds: dict[tuple[str, str], Speed]) -> Table:
    base = speeds.get((REFERENCE, "deploy"))
    rows = []
    for model in models:
        row, speed = PRINTED.get(model), speeds[model, "deploy"]
        rows.append(
            (
                row.printed if row else model,
                *((f"{row.miou:.2f}", f"{row.pixel_accuracy:.2f}", f"{row.speed:.1f}") if row else (None,) * 3),
                significant(speed.images_per_second),
                f"{row.speed / PRINTED[REFERENCE].speed:.2f}x" if row else None,
                over(speed, base) if base else speed.ratio,
                f"{speed.params / 1e6:.1f}",
                f"{speed.macs / 1e9:.1f}",
            )
        )
    header = (
        "backbone",
        "mIoU, paper",
        "pixel accuracy, paper",
        "examples/s, paper",
        "here",
        "speed over ResNet-50, paper",
        "here (95% interval)",
        "params, M",
        "FLOPs, B",
    )
    return Table("PSPNet, deploy form", header, rows)


def _forms(models: Sequence[str], speeds: dict[tuple[str, str], Speed]) -> Table:
    rows = []
    for model in models:
        deploy, training, batched = (speeds[model, form] for form in FORMS)
        name = PRINTED[model].printed if model in PRINTED else model
        shown = (significant(s.images_per_second) for s in (training, deploy, batched))
        rows.append((name, *shown, over(deploy, training), over(batched, deploy)))
    header = (
        "backbone",
        "training form, examples/s",
        "deploy form",
        "by space-to-batch",
        "folding gains (95% interval)",
        "space-to-batch gains (95% interval)",
    )
    return Table("Forms", header, rows)


def _by_engine(dilated: Sequence[Dilated]) -> Table:
    header = ("engine", "dilated, ms", "by space-to-batch, ms", "gain (95% interval)", "plain over dilated", "error")
    rows = [
        (
            d.engine,
            *(_milliseconds(d.seconds.get(form)) for form in ("dilated", "space to batch")),
            d.gain,
            d.plain,
            None if d.error is None else f"{d.error:.1e}",
        )
        for d in dilated
    ]
    return Table(f"{LAYERS} 3x3 layers like those of stage 4, dilation 2, in every engine at hand", header, rows)


def _milliseconds(seconds: list[float] | None) -> str | None:
    return f"{Times([[s] for s in seconds]).median * 1e3:.1f}" if seconds else None


def _overlaps(overlaps: dict[str, dict[str, Any]]) -> list[Table]:
    if not overlaps:
        return []
    rows = []
    for model, o in overlaps.items():
        row: SegmentationRow | None = PRINTED.get(model)
        paper = (f"{row.miou:.2f}", f"{row.pixel_accuracy:.2f}") if row else (None, None)
        rows.append((row.printed if row else model, *paper, f"{100 * o['mean_iou']:.2f}", f"{100 * o['pixel_accuracy']:.2f}"))
    data, split, epochs = (next(iter(overlaps.values()))[key] for key in ("data", "split", "epochs"))
    header = ("backbone", "mIoU, paper (Cityscapes)", "pixel accuracy, paper", "mIoU here", "pixel accuracy here")
    return [Table(f"Trained on {data} for {epochs} epochs, deploy form on its {split} split", header, rows)]


def _why(dilated: Sequence[Dilated]) -> str:
    faster = [d.engine for d in dilated if d.gain and d.gain.low > 1]
    slower = [d.engine for d in dilated if d.gain and d.gain.high < 1]
    verdict = "; ".join(f"{', '.join(names)}: {what}" for names, what in ((faster, "faster so"), (slower, "slower so")) if names)
    return (
        "The paper laments that a dilated 3x3 runs slowly, and has a fast plan that dilates five layers only. It need not: with "
        "dilation d it is d*d interleaved plain convolutions, exactly (space-to-batch), so that whatever a library does for plain "
        "ones serves for it too. Whether that gains anything depends on how the library runs the dilated one: "
        f"{verdict or 'here it makes no difference that the intervals show'}."
    )


# ---------------------------------------------------------------------------------------------------------------- measuring


def _engines(settings: PaperSettings) -> list[str]:
    """Return the engine asked for, or all that are at hand."""
    if settings.named_engine:
        return [settings.named_engine]
    return engines.installed(settings.precision, settings.device, str)


def layers(channels: int, dilation: int) -> nn.Module:
    """Return some layers of stage 4 in deploy form, with random weights, in eval mode."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation) for _ in range(LAYERS)]
    return nn.Sequential(*convs).eval()


def _dilated_if_it_can(engine: str, settings: PaperSettings) -> Dilated | None:
    """Build dilated layers in an engine; None if it runs whole networks alone."""
    try:
        return _dilated(engine, QUICK_SHAPE if settings.quick else SHAPE, settings)
    except ValueError as error:
        if settings.named_engine:
            raise
        settings.log(f"left out: {error}")
        return None


def _dilated(engine: str, size: tuple[int, int, int], settings: PaperSettings) -> Dilated:
    settings.log(f"dilated layers in {engine} ...")
    channels = size[0]
    networks = {"dilated": layers(channels, 2), "space to batch": space_to_batch(layers(channels, 2)), "plain": layers(channels, 1)}
    if engine == "native":
        del networks["space to batch"]
    images, batch = torch.randn(settings.protocol.batch_size, *size), settings.protocol.batch_size
    calls, outputs = {}, dict[str, Tensor]()
    for name, network in networks.items():
        built = engines.build(engine, network, replace(settings.options(batch), input_size=size))
        prepared = built.prepare(images)
        outputs[name] = built.finish(built.run(prepared)).clone()
        calls[name] = partial(built.run, prepared)
    p = settings.protocol
    times = interleave(calls, rounds=p.rounds, batches=p.batches, warmup=p.warmup, synchronise=synchroniser(settings.device))
    seconds = {name: t.by_round for name, t in times.items()}
    plain = ratio(times["dilated"], times["plain"])
    if "space to batch" not in times:
        return Dilated(engine, seconds, None, plain, None)
    exact = outputs["dilated"]
    error = float((outputs["space to batch"] - exact).abs().max() / exact.abs().max())
    return Dilated(engine, seconds, ratio(times["dilated"], times["space to batch"]), plain, error)


def _backbone_of(model: str, settings: PaperSettings) -> str:
    """Return the classifier that a PSPNet's backbone starts from; "" where none of those given is of its architecture."""
    for word in settings.init_backbone:
        name = (manifest_of(load(word)).arch or {}).get("name") if Path(word).exists() else resolve_name(word)
        if name == PSPNETS[model].backbone:
            return word
    if settings.init_backbone:
        settings.log(f"{model}: no classifier given is a {PSPNETS[model].backbone}: it starts from nothing")
    return ""


def _trained(model: str, settings: PaperSettings) -> dict[str, Any]:
    """Train a model by the data's own recipe, a run that goes on where it was; its figures in deploy form."""
    from repvgg.fold.reparameterize import reparameterize
    from repvgg.train.loop import train
    from repvgg.train.recipes import get_recipe
    from repvgg.train.segmentation import Segmentation as Task

    source = open_source(settings.data)
    recipe = get_recipe(source.recipe)
    if recipe.sync_bn and not settings.device.startswith("cuda"):
        recipe = replace(recipe, sync_bn=False)
    if settings.quick:
        source, recipe = source.limited(32), replace(recipe, epochs=2)
    out = settings.out / ("table8-quick" if settings.quick else "table8") / model
    init = _backbone_of(model, settings)
    train(model, source, recipe, out, init=init, device=settings.device, workers=settings.workers, log=settings.log)
    split = "test" if source.test else "val"
    deploy = reparameterize(load(out / "best.safetensors"))
    overlap = Task().evaluate_model(deploy, source, split, workers=settings.workers, device=settings.device)
    return {
        **overlap.figures,
        "init": init or "nothing",
        "data": source.name,
        "split": split,
        "epochs": recipe.epochs,
        "per_class": overlap.per_class,
    }
