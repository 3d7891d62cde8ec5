"""The native engine beside other engines on this machine: speed and error; writes results/engine.json and its figure.

python results/measure_engine.py [PART ...]       # on a machine that does nothing else; PARTS and MEMBERS; by default all that
                                                  # can be begun within 18 minutes; each is saved when it is done

Weights are random, but every batch norm has the statistics that its input has, so that each layer keeps the variance; errors are
judged against float64, relative to how much outputs differ from image to image. In each run the engines take turns. Each rival
runs at its best settings: MNN at its exact Winograd level, OpenVINO's INT8 with NNCF's scales for each channel.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repvgg_engine import Net, load, reference
from torch import Tensor, nn

import repvgg
from repvgg.bench.models import Candidate, network, randomise_norms
from repvgg.deploy import engines
from repvgg.deploy.engines import Engine, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.measure.machine import write_record
from repvgg.measure.timing import Times, interleave
from repvgg.measure.timing import ratio as ratio_of_times

THREADS, ROUNDS, ROUNDS_OF_MEMBERS = 2, 9, 3
TURN = 0.4  # seconds that an engine runs in each round, at least one call
RIVALS = ("openvino", "onnxruntime", "ncnn", "mnn")
CALIBRATION_IMAGES = 32  # of INT8
OUT = Path(__file__).with_name("engine.json")
BUDGET = 18 * 60  # seconds after which nothing more is begun, unless it was asked for by name
MEMBERS = tuple(f"repvgg_{name}" for name in ("a2", "b0", "b1", "b1g4", "a1", "b1g2", "b2", "b3", "d2se"))
WINOGRAD = ("direct", "F2", "F4", "F5", "F6", "F7")


def deploy_form(name: str) -> nn.Module:
    """A member of the family with weights that keep the variance."""
    torch.manual_seed(0)
    return repvgg.reparameterize(randomise_norms(repvgg.create_model(name), (4, 3, 224, 224)))


def model_file(name: str, folder: Path) -> Path:
    path = folder / f"{name}.safetensors"
    if not path.exists():
        repvgg.save(deploy_form(name), path)
    return path


@dataclass(frozen=True)
class Runner:
    """An engine on one batch. answer: its logits of any images, as many at a time as it was built for."""

    run: Callable[[], Any]
    answer: Callable[[Tensor], Any]


def native(net: Net, batch: Tensor) -> Runner:
    images = batch.numpy()
    return Runner(lambda: net(images), lambda some: np.concatenate([net(part.numpy()) for part in some.split(len(batch))]))


def rival(engine: Engine, batch: Tensor) -> Runner:
    prepared = engine.prepare(batch)
    return Runner(lambda: engine.run(prepared), lambda some: engine.in_turns(some, len(batch)).numpy())


def int8_files(name: str, folder: Path) -> tuple[Path, Path]:
    """INT8 for OpenVINO and for us, of one calibration by NNCF on the kind of images that are timed."""
    import nncf

    from repvgg.deploy import native_int8
    from repvgg.deploy.engines import openvino

    plain, path, ours = folder / f"{name}.xml", folder / f"{name}.int8.xml", folder / f"{name}.int8.safetensors"
    if not path.exists():
        images, deploy = torch.randn(CALIBRATION_IMAGES, 1, 3, 224, 224).numpy(), deploy_form(name)
        openvino.write(deploy, Signature((3, 224, 224)), plain)
        net = nncf.quantize(openvino.read(plain), nncf.Dataset(list(images)), subset_size=CALIBRATION_IMAGES)
        openvino.save(net, path, "")
        native_int8.write(deploy, net, ours)
    return path, ours


def openvino_int8(name: str, batch: Tensor, folder: Path) -> Runner:
    from repvgg.deploy.engines import openvino

    return rival(openvino.open_file(int8_files(name, folder)[0], Options(batch_size=len(batch), threads=THREADS)), batch)


def compare(
    name: str,
    folder: Path,
    batch_size: int,
    precision: str,
    accuracies: tuple[str, ...],
    rivals: tuple[str, ...] = RIVALS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Return the figures of one row: our nets and the rivals that are named, all taking turns.

    accuracies: of our nets, after a precision of their own ("int16 high") where it is not the row's.
    """
    torch.manual_seed(0)
    path, images = model_file(name, folder), torch.randn(max(batch_size, 4), 3, 224, 224)
    batch, judged, options = images[:batch_size], images[:4], Options((3, 224, 224), batch_size, precision, THREADS)
    words = {a: (a if " " in a else f"{precision} {a}").split() for a in accuracies}
    files = {"int8": int8_files(name, folder)[1]} if any(own == "int8" for own, _ in words.values()) else {}
    nets = {
        a: load(files.get(own, path), precision=own, accuracy=accuracy, threads=THREADS) for a, (own, accuracy) in words.items()
    }
    runners = {f"native {a}": native(net, batch) for a, net in nets.items()}
    model = deploy_form(name)
    for engine in rivals:
        runners[engine] = (
            openvino_int8(name, batch, folder) if engine == "openvino int8" else rival(engines.build(engine, model, options), batch)
        )
    wanted = reference.run(next(iter(nets.values())).layers, judged.numpy())
    errors = {key: reference.error(runner.answer(judged), wanted) for key, runner in runners.items()}
    slowest = max(once(runner.run) for runner in runners.values())
    calls = {key: runner.run for key, runner in runners.items()}
    times = interleave(calls, rounds=rounds, batches=max(1, int(TURN / slowest)), warmup=2)
    best = min(rivals, key=lambda key: times[key].median)
    for key, t in times.items():
        over = "" if key in rivals else f", {ratio_of_times(times[best], t)} over the best rival, {best}"
        say(f"{name} {precision} batch {batch_size}: {key} {batch_size / t.median:.1f} img/s, error {errors[key]:.1e}{over}")
    return {key: described(t, batch_size, errors[key]) for key, t in times.items()}


def once(run: Callable[[], Any]) -> float:
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def described(times: Times, batch_size: int, error: float) -> dict[str, Any]:
    speeds = [batch_size / seconds for seconds in times.by_round]
    return {"images_per_second": statistics.median(speeds), "by_round": speeds, "rms_error": error}


def a0(folder: Path) -> dict[str, Any]:
    row = partial(compare, "repvgg_a0", folder)
    rows = {
        "fp32, batch 32": row(32, "fp32", ("high", "fast", "exact")),
        "fp32, batch 1": row(1, "fp32", ("high", "exact")),
        "int8, batch 32": row(32, "fp32", ("high", "fast"), ("openvino int8",)),
        "int8, batch 1": row(1, "fp32", ("high",), ("openvino int8",)),
    }
    if has_bf16():
        rows["bf16, batch 32"] = row(32, "bf16", ("high",), ("openvino",))
        rows["bf16, batch 1"] = row(1, "bf16", ("high",), ("openvino",))
    return rows


def has_bf16() -> bool:
    from repvgg_engine import instruction_sets

    return "bf16" in instruction_sets() and os.environ.get("REPVGG_ENGINE_ISA", "avx512") == "avx512"


def int16(folder: Path) -> dict[str, Any]:
    """Integer products beside our other precisions and OpenVINO's INT8."""
    natives = ("high", "fast", *(["bf16 high"] if has_bf16() else []), "int16 high", "int16 fast", "int8 high")
    return {
        f"{name}, batch {n}": compare(name, folder, n, "fp32", natives, ("openvino", "openvino int8"))
        for name in ("repvgg_a0", "repvgg_a2")
        for n in (32, 1)
    }


def int8(folder: Path) -> dict[str, Any]:
    """8-bit integers beside OpenVINO's, of the same calibration."""
    return {
        f"{name}, batch {n}": compare(name, folder, n, "fp32", ("int16 high", "int8 high"), ("openvino int8",))
        for name in ("repvgg_a0", "repvgg_a2")
        for n in (32, 1)
    }


def member(name: str, folder: Path) -> dict[str, Any]:
    return {name: compare(name, folder, 8, "fp32", ("high",), rounds=ROUNDS_OF_MEMBERS)}


def against_resnets(folder: Path) -> dict[str, Any]:
    """Ours in the native engine, the ResNet in the best of the others: do the paper's ratios come back?"""
    figures = {}
    for ours, resnet, paper in (("repvgg_a2", "resnet50", 1.83), ("repvgg_a0", "resnet18", 1.33)):
        images = torch.randn(32, 3, 224, 224)
        model, _ = network(Candidate(resnet))
        calls: dict[str, Callable[[], Any]] = {}
        for engine in ("openvino", "onnxruntime"):
            built = engines.build(engine, model, Options(batch_size=32, threads=THREADS))
            calls[engine] = partial(built.run, built.prepare(images))
        calls["native"] = partial(load(model_file(ours, folder), threads=THREADS), images.numpy())
        times = interleave(calls, rounds=ROUNDS, batches=1, warmup=2)
        best = min(("openvino", "onnxruntime"), key=lambda name: times[name].median)
        value = ratio_of_times(times[best], times["native"])
        say(f"{ours} native over {resnet} {best}, batch 32: {value}; in the paper {paper}")
        speeds = {name: 32 / t.median for name, t in times.items()}
        figures[f"{ours} over {resnet}"] = {"ratio": asdict(value), "best": best, "paper": paper, "images_per_second": speeds}
    return figures


def avx2(folder: Path) -> dict[str, Any]:
    """In a process of its own, because oneDNN reads its limit when it is loaded."""
    call = (
        "compare('repvgg_a0', Path(sys.argv[1]), 32, 'fp32', ('high', 'fast', 'int16 high', 'int16 fast', 'int8 high'),"
        " (*RIVALS, 'openvino int8'))"
    )
    script = f"import json; from measure_engine import *; print(json.dumps({call}))"
    environment = {**os.environ, "REPVGG_ENGINE_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


FIRST = {
    "native": """
import sys, numpy as np, repvgg_engine
net = repvgg_engine.load(sys.argv[1], threads=2)
net(np.zeros((int(sys.argv[2]), 3, 224, 224), np.float32))
""",
    "openvino": """
import sys, numpy as np, openvino
n = int(sys.argv[2])
c = openvino.Core(); m = c.read_model(sys.argv[1]); m.reshape([n, 3, 224, 224])
r = c.compile_model(m, "CPU", {"INFERENCE_NUM_THREADS": "2", "INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
r.infer({0: np.zeros((n, 3, 224, 224), np.float32)})
""",
}
MEMORY = """
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0], status.split("VmRSS:")[1].split()[0])
"""


def start(folder: Path) -> dict[str, Any]:
    """Return seconds from a process's start to its exit with one prediction, and its memory, without a plan (cold) and with one."""
    path, onnx, found = model_file("repvgg_a0", folder), folder / "a0.onnx", {}
    onnx.write_bytes(to_onnx(deploy_form("repvgg_a0"), Signature((3, 224, 224))))
    for name, file, cold in (("native cold", path, True), ("native", path, False), ("openvino", onnx, False)):
        for batch_size in (1, 32):
            runs = [first(name.split()[0], file, batch_size, folder, cold) for _ in range(5)]
            row = {"seconds": statistics.median(r[0] for r in runs), "spread": [min(runs)[0], max(runs)[0]]}
            row |= {"peak_kib": runs[-1][1], "resident_kib": runs[-1][2]}
            found[f"{name}, batch {batch_size}"] = row
            say(f"{name}, batch {batch_size}: first answer after {row['seconds']:.2f} s, peak {runs[-1][1] / 1024:.0f} MiB")
    return found


def first(name: str, file: Path, batch_size: int, folder: Path, cold: bool) -> tuple[float, int, int]:
    """Return seconds, and peak and last resident memory in KiB, of a process that answers once."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "REPVGG_ENGINE_CACHE": empty if cold else str(folder / "plans")}
        began = time.perf_counter()
        command = [sys.executable, "-c", FIRST[name] + MEMORY, str(file), str(batch_size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peak, resident = map(int, done.stdout.split()[-2:])
        return time.perf_counter() - began, peak, resident


def algorithms(folder: Path) -> dict[str, Any]:
    """Error against speed, one algorithm for all layers that it fits, all taking turns: the figure of docs/engine.md."""
    from repvgg_engine import tune

    nets = {(p, name): _by(name, p, model_file("repvgg_a0", folder)) for p in ("fp32", "bf16") for name in WINOGRAD}
    one = next(iter(nets.values()))
    images, batch = tune.calibration_images(one), torch.randn(32, 3, 224, 224).numpy()
    kinds = {"smooth": images[: len(images) // 2], "noise": images[len(images) // 2 :]}
    wanted = {kind: reference.run(one.layers, x) for kind, x in kinds.items()}
    times = interleave({" ".join(key): partial(net.run, batch) for key, net in nets.items()}, rounds=ROUNDS, batches=1, warmup=1)
    figures = {}
    for key, net in nets.items():
        name, errors = " ".join(key), {kind: reference.error(net.run(x), wanted[kind]) for kind, x in kinds.items()}
        figures[name] = {"images_per_second": 32 / times[name].median, "rms_error": errors}
        say(f"{name}: {32 / times[name].median:.1f} img/s, errors {errors}")
    return figures


def _by(name: str, precision: str, path: Path) -> Net:
    """All layers but the first by that algorithm, those that it does not fit by the next best of the precision."""
    net = load(path, precision=precision, accuracy="exact", threads=THREADS)
    for i in range(1, len(net.layers)):
        if has := [n for n in net.algorithms(i) if n.endswith("bf16") == (precision == "bf16")]:
            own = [n for n in has if n.split()[0] == name]
            others = has[0] if name == "direct" or len(has) == 1 else has[-2]
            net.choose(i, own[0] if own else others)
    return net


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a0": a0,
    "int16": int16,
    "int8": int8,
    "avx2": avx2,
    "start": start,
    "against_resnets": against_resnets,
    "algorithms": algorithms,
}


def main() -> None:
    torch.set_num_threads(THREADS)
    began = time.monotonic()
    figures: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for word in sys.argv[1:] or [*PARTS, *MEMBERS]:
            if not sys.argv[1:] and time.monotonic() - began > BUDGET:
                say(f"{word}: left out, for want of time; python results/measure_engine.py {word}")
                continue
            part, measure = (word, PARTS[word]) if word in PARTS else ("members", partial(member, word))
            figures[part] = {**figures.get(part, {}), **measure(Path(folder)), "load_before": os.getloadavg()[0]}
            protocol = {"threads": THREADS, "rounds": ROUNDS, "rounds_of_members": ROUNDS_OF_MEMBERS, "about": __doc__}
            write_record(OUT, {**figures, "protocol": protocol})
    if "algorithms" in figures:
        draw(figures["algorithms"])


def draw(figures: dict[str, Any]) -> None:
    """Error against speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 4))
    for precision, marker in (("fp32", "o"), ("bf16", "s")):
        points = {n.split()[1]: f for n, f in figures.items() if n.startswith(precision)}
        speeds = [f["images_per_second"] for f in points.values()]
        errors = [f["rms_error"]["smooth"] for f in points.values()]
        axes.plot(errors, speeds, marker=marker, label=precision)
        for name, x, y in zip(points, errors, speeds, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("root mean square error of the logits against float64, relative to their deviation across images")
    axes.xaxis.label.set_fontsize(8)
    axes.set_ylabel("RepVGG-A0, images a second, batch 32")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    plt.tight_layout()
    plt.savefig(Path(__file__).with_name("engine.png"), dpi=130)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
