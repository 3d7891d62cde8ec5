"""The native engine beside other engines on this machine: speed and error; writes results/engine.json and its figure.

python results/measure_engine.py [PART ...]       # on a machine that does nothing else; see PARTS and MEMBERS; by default all

Weights are random, but every batch norm has the statistics that its input has, so that each layer keeps the variance; errors are
judged against float64, relative to how much outputs differ from image to image. In each run the engines take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from repvgg_engine import Net, load
from repvgg_engine.bench import Speed, bench, ratio

import repvgg
from repvgg.bench.models import Candidate, network, randomise_norms
from repvgg.deploy import engines
from repvgg.deploy.engines import Options
from repvgg.measure.machine import write_record
from repvgg.measure.timing import interleave
from repvgg.measure.timing import ratio as ratio_of_times

THREADS, ROUNDS, ROUNDS_OF_MEMBERS = 2, 9, 3
OUT = Path(__file__).with_name("engine.json")
MEMBERS = (
    "repvgg_a1",
    "repvgg_a2",
    "repvgg_b0",
    "repvgg_b1",
    "repvgg_b1g2",
    "repvgg_b1g4",
    "repvgg_b2",
    "repvgg_b3",
    "repvgg_d2se",
)
WINOGRAD = ("direct", "F2", "F4", "F5", "F6", "F7")


def model_file(name: str, folder: Path) -> Path:
    """A member of the family in deploy form with weights that keep the variance."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        repvgg.save(repvgg.reparameterize(randomise_norms(repvgg.create_model(name), (4, 3, 224, 224))), path)
    return path


def compare(
    path: Path, batch_size: int, precision: str, accuracies: list[str], against: list[str], rounds: int = ROUNDS, judged: int = 4
) -> dict[str, Any]:
    nets = {f"native {a}": load(path, precision=precision, accuracy=a, threads=THREADS) for a in accuracies}
    speeds = bench(nets, against, batch_size, rounds, judged)
    first = against[0]
    for name, s in speeds.items():
        error = f"error {s.error:.1e}, {s.error / speeds[first].error:.2f} times its"
        speed = f"{s.median:.1f} img/s, {ratio(s, speeds[first]):.2f} times {first}"
        say(f"{path.stem} {precision} batch {batch_size}: {name} {speed}; {error}")
    return {name: describe(s, speeds[first]) for name, s in speeds.items()}


def describe(s: Speed, reference: Speed) -> dict[str, Any]:
    return {
        "images_per_second": s.median,
        "quartiles": s.quartiles,
        "by_round": s.images_per_second,
        "ratio_to_first": ratio(s, reference),
        "rms_error": s.error,
        "error_over_first": s.error / reference.error,
    }


def a0(folder: Path) -> dict[str, Any]:
    path = model_file("repvgg_a0", folder)
    rivals = ["openvino", "onnxruntime", "ncnn", "mnn"]
    return {
        "fp32, batch 32": compare(path, 32, "fp32", ["high", "fast", "exact"], rivals),
        "fp32, batch 1": compare(path, 1, "fp32", ["high", "exact"], rivals),
        "bf16, batch 32": compare(path, 32, "bf16", ["high"], ["openvino"]),
        "bf16, batch 1": compare(path, 1, "bf16", ["high"], ["openvino"]),
    }


def member(name: str, folder: Path) -> dict[str, Any]:
    return {name: compare(model_file(name, folder), 8, "fp32", ["high"], ["openvino", "onnxruntime"], ROUNDS_OF_MEMBERS)}


def against_resnets(folder: Path) -> dict[str, Any]:
    """Ours in the native engine, the ResNet in the best of the others: do the paper's ratios come back?"""
    figures = {}
    for ours, resnet, paper in (("repvgg_a2", "resnet50", 1.83), ("repvgg_a0", "resnet18", 1.33)):
        images = torch.randn(32, 3, 224, 224)
        model, _ = network(Candidate(resnet))
        calls: dict[str, Callable[[], Any]] = {}
        for engine in ("openvino", "onnxruntime"):
            built = engines.build(engine, model, Options(batch_size=32, threads=THREADS))
            calls[engine] = _run(built.run, built.prepare(images))
        calls["native"] = _run(load(model_file(ours, folder), threads=THREADS), images.numpy())
        times = interleave(calls, rounds=ROUNDS, batches=1, warmup=2)
        best = min(("openvino", "onnxruntime"), key=lambda name: times[name].median)
        value = ratio_of_times(times[best], times["native"])
        say(f"{ours} native over {resnet} {best}, batch 32: {value}; in the paper {paper}")
        speeds = {name: 32 / t.median for name, t in times.items()}
        figures[f"{ours} over {resnet}"] = {"ratio": asdict(value), "best": best, "paper": paper, "images_per_second": speeds}
    return figures


def avx2(folder: Path) -> dict[str, Any]:
    """In a process of its own, because oneDNN reads its limit when it is loaded."""
    environment = {**os.environ, "REPVGG_ENGINE_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    path = model_file("repvgg_a0", folder)
    figures = compare_in_process(path, environment)
    say(f"repvgg_a0 fp32 batch 32, AVX2: {figures['native high']['ratio_to_first']:.2f} times OpenVINO")
    return figures


def compare_in_process(path: Path, environment: dict[str, str]) -> dict[str, Any]:
    call = f"compare(Path({str(path)!r}), 32, 'fp32', ['high'], ['openvino'])"
    script = f"import json; from measure_engine import *; print(json.dumps({call}))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


FIRST = {
    "native": """
import sys, numpy as np, repvgg_engine
net = repvgg_engine.load(sys.argv[1], threads=2)
for _ in range(int(sys.argv[2])): net(np.zeros((1, 3, 224, 224), np.float32))
""",
    "openvino": """
import sys, numpy as np, openvino
c = openvino.Core(); m = c.read_model(sys.argv[1]); m.reshape([1, 3, 224, 224])
r = c.compile_model(m, "CPU", {"INFERENCE_NUM_THREADS": "2", "INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
for _ in range(int(sys.argv[2])): r.infer({0: np.zeros((1, 3, 224, 224), np.float32)})
""",
}


def start(folder: Path) -> dict[str, Any]:
    """Seconds from process start to exit with one prediction, and the resident memory of a process that has made ten."""
    from repvgg_engine.rivals import to_onnx

    path = model_file("repvgg_a0", folder)
    onnx = folder / "a0.onnx"
    onnx.write_bytes(to_onnx(load(path, accuracy="exact").layers))
    load(path, threads=THREADS)(torch.zeros(1, 3, 224, 224).numpy())  # tuned, if it was not
    memory = "\nimport resource\nprint(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    figures = {}
    for name, script in FIRST.items():
        file = str(path if name == "native" else onnx)
        seconds = []
        for _ in range(8):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", script, file, "1"], check=True)
            seconds.append(time.perf_counter() - began)
        done = subprocess.run([sys.executable, "-c", script + memory, file, "10"], check=True, capture_output=True, text=True)
        figures[name] = {
            "seconds": statistics.median(seconds[1:]),
            "spread": [min(seconds[1:]), max(seconds[1:])],
            "resident_kib": int(done.stdout),
        }
        say(f"{name}: first prediction after {figures[name]['seconds']:.2f} s, {int(done.stdout) / 1024:.0f} MiB resident")
    return figures


def algorithms(folder: Path) -> dict[str, Any]:
    """Error against speed, one algorithm for all layers that it fits, all taking turns: the figure of docs/engine.md."""
    from repvgg_engine import reference, tune

    nets = {(p, name): _by(name, p, model_file("repvgg_a0", folder)) for p in ("fp32", "bf16") for name in WINOGRAD}
    one = next(iter(nets.values()))
    images, batch = tune.calibration_images(one), torch.randn(32, 3, 224, 224).numpy()
    kinds = {"smooth": images[: len(images) // 2], "noise": images[len(images) // 2 :]}
    wanted = {kind: reference.run(one.layers, x) for kind, x in kinds.items()}
    times = interleave({" ".join(key): _run(net.run, batch) for key, net in nets.items()}, rounds=ROUNDS, batches=1, warmup=1)
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
    "algorithms": algorithms,
    "against_resnets": against_resnets,
    "avx2": avx2,
    "start": start,
}


def main() -> None:
    torch.set_num_threads(THREADS)
    figures: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for word in sys.argv[1:] or [*PARTS, *MEMBERS]:
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


def _run(function: Callable[[Any], Any], images: Any) -> Callable[[], Any]:
    return lambda: function(images)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
