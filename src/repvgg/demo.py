"""`repvgg demo`: the whole road on embedded data, and a page that shows it.

Train a small RepVGG on handwritten digits, fold it, prove the fold, time both forms side by side, read held-out scans.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from repvgg.data import Source
from repvgg.data.digits import open_digits
from repvgg.data.transforms import Transformed, eval_transform, normalise
from repvgg.deploy.staged import refuse_strangers
from repvgg.disk import FileError, read_text, write_text
from repvgg.fold.as_linear import Branches
from repvgg.fold.proof import Verification, verify
from repvgg.fold.reparameterize import reparameterize
from repvgg.measure.machine import this_machine, write_record
from repvgg.measure.timing import Ratio, Times, interleave, ratio
from repvgg.models.load import load, save
from repvgg.models.repvgg import Layer, RepVGG
from repvgg.terminal import print_table
from repvgg.train.evaluate import Accuracy, evaluate_model
from repvgg.train.loop import Run, train
from repvgg.train.recipes import get_recipe
from repvgg.web import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARCH = "repvgg_micro"
BATCH = 64  # of the timing
TWO_CHANNELS = 2 / 32  # the width at which stages 1 and 2 of ARCH have two channels, for the drawing of a block
GRID = 20  # predictions shown


@dataclass(frozen=True)
class Story:
    """Everything that the page shows."""

    run: Run
    deploy: nn.Module
    proof: Verification
    accuracies: tuple[Accuracy, Accuracy]
    same_predictions: bool
    layer_errors: list[tuple[str, float]]
    times: dict[str, Times]
    speedup: Ratio
    block: Branches
    shown: list[tuple[Tensor, str, str, float]]  # scan, label, prediction, its probability


def run(out: Path, seed: int = 0) -> None:
    """Run the demo into the folder `out`, printing each step and ending with the page's address."""
    started = time.perf_counter()
    refuse_another(out, seed)
    torch.manual_seed(seed)
    source = open_digits()
    print(f"1. Train {ARCH} (3x3 + 1x1 + identity branches) on {len(source.train):,} scans of handwritten digits")
    trained = train(ARCH, source, get_recipe("demo"), out / "run", seed=seed)
    assert isinstance(trained.model, RepVGG)
    print("\n2. Fold every block into one 3x3 convolution, and prove it")
    model = load(out / "run" / "last.safetensors")
    deploy = reparameterize(model)
    proof = verify(model, deploy, source.preprocessing.input_size)
    save(deploy, out / "deploy.safetensors")
    print(f"   {deploy.fold_report}\n   whole model: {proof}")
    accuracies = evaluate_model(model, source), evaluate_model(deploy, source)
    images, labels = _held_out(source)
    training_logits, logits = _logits(model, images), _logits(deploy, images)
    same = bool((training_logits.argmax(1) == logits.argmax(1)).all())
    print(f"   top-1 on {accuracies[0].images} held-out scans: {accuracies[0].top1:.2%} and {accuracies[1].top1:.2%}", end=", ")
    print("every prediction the same" if same else "PREDICTIONS DIFFER")
    print("\n3. Time both forms, taking turns")
    times = _time(model, deploy, images)
    speedup = ratio(times["training form"], times["deploy form"])
    rows = [(name, f"{BATCH / t.median:,.0f}", *(f"{BATCH / q:,.0f}" for q in reversed(t.quartiles))) for name, t in times.items()]
    print_table(("", "images/s", "lower quartile", "upper"), rows)
    print(f"   the deploy form has {speedup} the speed (95% interval over {len(times['deploy form'].rounds)} rounds)")
    print("\n4. Read the held-out scans that it is least sure of")
    shown = _shown(source, logits, labels)
    print_table(
        ("scan", "label", "read as", "probability"), [(i, true, p, f"{x:.1%}") for i, (_, true, p, x) in enumerate(shown[:8])]
    )
    _save_scans(shown, out / "scans")
    block = _two_channel_block(source, out / "two-channels", seed)
    story = Story(trained, deploy, proof, accuracies, same, _layer_errors(model, deploy, images), times, speedup, block, shown)
    write_text(out / "index.html", _page(story, model))
    write_record(out / "demo.json", {**_figures(story), "seconds": time.perf_counter() - started}, "cpu")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at {out / 'index.html'}, or go on:")
    print(f"  repvgg info {out / 'deploy.safetensors'}")
    print(f"  repvgg predict {out / 'deploy.safetensors'} {out / 'scans'}")


def _held_out(source: Source) -> tuple[Tensor, Tensor]:
    scans = Transformed(source.val, eval_transform(source.preprocessing))
    pixels, labels = zip(*(scans[i] for i in range(len(scans))), strict=True)
    return normalise(torch.stack(pixels), source.preprocessing), torch.tensor(labels)


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _time(model: nn.Module, deploy: nn.Module, images: Tensor) -> dict[str, Times]:
    batch = images[:BATCH].contiguous(memory_format=torch.channels_last)
    calls = {"training form": lambda: _logits(model, batch), "deploy form": lambda: _logits(deploy, batch)}
    return interleave(calls, rounds=15, batches=8, warmup=5)


def _shown(source: Source, logits: Tensor, labels: Tensor) -> list[tuple[Tensor, str, str, float]]:
    """Return held-out scans with what was read: the least certain first, since the easy ones all look alike."""
    probability, predicted = logits.softmax(1).max(1)
    order = probability.argsort()[: GRID // 2].tolist() + probability.argsort(descending=True)[: GRID // 2].tolist()
    names = source.classes
    return [(source.val[i][0], names[int(labels[i])], names[int(predicted[i])], float(probability[i])) for i in order]


def _save_scans(shown: list[tuple[Tensor, str, str, float]], folder: Path) -> None:
    """Write the scans as files to try `repvgg predict` on, named by their label."""
    folder.mkdir(exist_ok=True)
    for number, (scan, label, _, _) in enumerate(shown):
        Image.fromarray(scan[0].numpy()).save(folder / f"{label}-{number:02}.png")


@torch.inference_mode()
def _layer_errors(model: nn.Module, deploy: nn.Module, images: Tensor) -> list[tuple[str, float]]:
    """Return for each layer, on real scans, the largest difference between the two forms relative to the largest output."""
    wanted, got = _layer_outputs(model, images), _layer_outputs(deploy, images)
    return [(name, float((got[name] - output).abs().max() / output.abs().max())) for name, output in wanted.items()]


def _layer_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.update({name: output})

    watched = [(name, m) for name, m in model.named_modules() if isinstance(m, Layer) or name == "head"]
    hooks = [module.register_forward_hook(keep(name)) for name, module in watched]
    model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def refuse_another(out: Path, seed: int) -> None:
    """Raise `FileError` where the folder holds the demo of another seed, or a page of something else."""
    refuse_strangers(out, "run", "index.html", "deploy.safetensors", "demo.json", "scans")
    settings = out / "run" / "settings.json"
    if settings.exists() and (before := json.loads(read_text(settings)).get("seed")) != seed:
        raise FileError(f"{out}: holds the demo of seed {before}, not {seed}: give another --out, or --seed {before}")


def _two_channel_block(source: Source, out: Path, seed: int) -> Branches:
    """Train a block small enough to draw: in a net of the same shape whose first stages have two channels."""
    recipe = replace(get_recipe("demo"), epochs=2)
    narrow = train(ARCH, source, recipe, out, seed=seed, width=TWO_CHANNELS, log=lambda line: None).model
    block = narrow.get_submodule("stages.0.1.block")
    assert isinstance(block, Branches)
    return block.eval()


def _figures(s: Story) -> dict[str, Any]:
    return {
        "arch": ARCH,
        "top1": {"training form": s.accuracies[0].top1, "deploy form": s.accuracies[1].top1},
        "same_predictions": s.same_predictions,
        "max_rel_err": s.proof.max_rel_err,
        "seconds_per_batch": {name: {"median": t.median, "quartiles": t.quartiles} for name, t in s.times.items()},
        "batch_size": BATCH,
        "rounds": len(s.times["deploy form"].rounds),
        "speedup": [s.speedup.value, s.speedup.low, s.speedup.high],
        "training_seconds": s.run.seconds,
    }


# ---------------------------------------------------------------------------------------------------------------- the page


def _page(s: Story, model: nn.Module) -> str:
    from repvgg.paper import figure2, figure4

    assert isinstance(model, RepVGG)
    assert isinstance(s.deploy, RepVGG)
    count = {form: sum(p.numel() for p in m.parameters()) for form, m in (("training", model), ("deploy", s.deploy))}
    top1, images, rounds = s.accuracies[0].top1, s.accuracies[0].images, len(s.times["deploy form"].rounds)
    worst = max(error for _, error in s.layer_errors)
    lead = (
        f"A network of three branches a layer learned to read digits: {top1:.1%} of {images} held-out scans. "
        f"Folded into plain 3x3 convolutions it gives the same answers at {s.speedup.value:.2f} times the speed."
    )
    learning = page.paragraph(
        f"{ARCH}, trained for {s.run.seconds:.0f} s on this machine. The loss is a mean over the last steps; "
        "the accuracy is measured on held-out scans after each epoch."
    ) + page.charts(map(page.svg, _learning_curves(s.run.history)))
    structure = page.paragraph(
        "In training each layer is a sum of a 3x3 convolution, a 1x1 convolution and the identity, each with its batch norm "
        f"({count['training']:,} parameters). In deploy form it is one 3x3 convolution with bias ({count['deploy']:,})."
    ) + page.svg(figure2.draw(model, s.deploy), "The paper's Figure 2, drawn from the model that was just trained.")
    algebra = page.paragraph(
        "A batch norm at its running statistics scales and shifts each channel, so it goes into the kernel before it. "
        "A 1x1 kernel is a 3x3 kernel with zeros around it, and the identity is a 1x1 kernel too. "
        "Convolutions of the same input add up."
    ) + page.svg(figure4.draw(s.block), "The paper's Figure 4, on a trained block of two channels. Every number is computed.")
    proof = page.paragraph(
        f"Each layer's output in both forms, on the same scans, in float32. The largest difference anywhere is {worst:.1e} "
        f"of the layer's largest output: rounding. Against float64 the whole model is {s.proof.max_rel_err:.1e} off, "
        f"where {s.proof.bound:.0e} is allowed; "
        f"{'every held-out scan gets the same label' if s.same_predictions else 'some scans get different labels'} from both."
    ) + page.svg(_error_dots(s.layer_errors))
    speed = page.paragraph(
        f"Both forms on the same batch of {BATCH} scans, taking turns over {rounds} rounds, so that whatever else this machine "
        f"does hits both alike. The deploy form has {s.speedup} the speed (95% interval)."
    ) + page.svg(_speed_bars(s.times))
    pieces = [
        page.png(scan[0].numpy(), f"a scan of a {true}", f"{'read' if true == read else f'a {true}, read'} as {read} ({p:.0%})")
        for scan, true, read, p in s.shown
    ]
    reading = page.paragraph(f"The {GRID // 2} scans that the network was least sure of, then the surest.") + page.grid(pieces)
    where = page.machine(this_machine("cpu"))
    sections = [
        ("It learns", learning),
        ("One layer, before and after", structure),
        ("The fold, step by step", algebra),
        ("The proof", proof),
        ("The gain", speed),
        ("What it reads", reading),
        ("Measured on", where),
    ]
    return page.page("RepVGG, from training to plain 3x3", sections, lead)


def _learning_curves(history: list[dict[str, Any]]) -> list["Figure"]:
    from repvgg.web import charts

    per_epoch = next(h["step"] / (h["epoch"] + 1) for h in history if "val_top1" in h)
    losses = [(h["step"] / per_epoch, h["loss"]) for h in history if "loss" in h]
    top1 = [(h["epoch"] + 1.0, h["val_top1"] * 100) for h in history if "val_top1" in h]
    best = max(top1, key=lambda point: point[1])
    return [
        charts.curves("training loss", {"": losses}, level=True),
        charts.curves("top-1 on held-out scans, %", {"": top1}, best),
    ]


def _error_dots(errors: list[tuple[str, float]]) -> "Figure":
    """Draw each layer's error as a dot: a bar on a logarithmic axis would have a length that means nothing."""
    from repvgg.web import charts
    from repvgg.web.drawing import WIDEST

    figure, axes = charts.chart("relative difference, layer by layer")
    shown = [(name.removeprefix("stages."), error) for name, error in errors if error]  # a layer without any error has no place
    axes.plot(*zip(*shown, strict=True), "o", color=WIDEST[1])
    axes.axhline(2**-23, color="#667080", linewidth=1, linestyle="--", label="one unit in the last place of float32")
    axes.legend(loc="best", frameon=False, fontsize=charts.TEXT * 0.92)
    axes.set_yscale("log")
    found = [2**-23, *(error for _, error in shown)]
    axes.set_ylim(min(found) / 4, max(found) * 8)
    axes.set_xlabel("layer (stage.layer)", fontsize=charts.TEXT)
    axes.tick_params(axis="x", rotation=90)
    return figure


def _speed_bars(times: dict[str, Times]) -> "Figure":
    from repvgg.web import charts
    from repvgg.web.drawing import IDENTITY, RULE

    figure, axes = charts.chart("images a second", 170)
    names = list(times)[::-1]
    speeds = [BATCH / times[n].median for n in names]
    spread = [[s - BATCH / times[n].quartiles[1], BATCH / times[n].quartiles[0] - s] for n, s in zip(names, speeds, strict=True)]
    axes.barh(names, speeds, xerr=list(zip(*spread, strict=True)), color=[IDENTITY[1], RULE], height=0.6, capsize=4)
    for i, speed in enumerate(speeds):
        colour = "white" if i == 0 else "#1d2530"
        axes.text(speed * 0.03, i, f"{speed:,.0f}", va="center", color=colour, fontweight="bold", fontsize=charts.TEXT)
    axes.set_xlabel("median; whiskers are quartiles over rounds", fontsize=charts.TEXT)
    return figure
