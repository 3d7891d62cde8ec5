"""The native engine beside other engines on this machine: speed and error; writes results/engine.json and its figure.

python results/measure_engine.py [PART ...]       # on a machine that does nothing else; PARTS and MEMBERS; by default all that
                                                  # can be begun within 18 minutes; each is saved when it is done
REPVGG_ENGINE_ISA=avx2 python results/measure_engine.py a0      # RepVGG-A0 with AVX2 alone: the part avx2

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_figure import draw
from records import keep, say
from repvgg_engine import Net, load, reference
from torch import Tensor, nn

import repvgg
from repvgg.bench.models import Candidate, network, randomise_norms
from repvgg.deploy import engines
from repvgg.deploy.engines import Engine, Options, Signature
from repvgg.deploy.engines.graph import to_onnx
from repvgg.measure.timing import Times, interleave
from repvgg.measure.timing import ratio as ratio_of_times

THREADS, ROUNDS, ROUNDS_OF_MEMBERS = 2, 9, 3
TURN = 0.4  # seconds that an engine runs in each round, at least one call
MICRO = "repvgg_micro"  # as small networks run: 64 images of 32 pixels at a time, on one thread
RIVALS = ("openvino", "onnxruntime", "ncnn", "mnn")
CALIBRATION_IMAGES = 32  # of INT8
IMAGES = 64  # that are drawn for every run, whatever its batch: errors of two runs are of the same images
REPEATS = 5  # of a process that answers once
Run = dict[str, dict[str, Any]]  # of an engine: images_per_second, by_round, rms_error
OUT = Path(__file__).with_name("engine.json")
BUDGET = 18 * 60  # seconds after which nothing more is begun, unless it was asked for by name
MEMBERS = tuple(f"repvgg_{name}" for name in ("a2", "b0", "b1", "b1g4", "a1", "b1g2", "b2", "b3", "d2se"))
WINOGRAD = ("direct", "F2", "F4", "F5", "F6", "F7")


def size(name: str) -> tuple[int, int, int]:
    """Channels, height and width of a network's images."""
    return (3, 32, 32) if name == MICRO else (3, 224, 224)


def threads(name: str) -> int:
    """Return the number of threads that a network is timed on."""
    return 1 if name == MICRO else THREADS


def deploy_form(name: str) -> nn.Module:
    """Return a member of the family with weights that keep the variance."""
    torch.manual_seed(0)
    model = repvgg.create_model(name, num_classes=10, small_input=True) if name == MICRO else repvgg.create_model(name)
    return repvgg.reparameterize(randomise_norms(model, (4, *size(name))))


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
        deploy = deploy_form(name)
        images = torch.randn(CALIBRATION_IMAGES, 1, *size(name), generator=torch.Generator().manual_seed(1)).numpy()
        openvino.write(deploy, Signature(size(name)), plain)
        net = nncf.quantize(openvino.read(plain), nncf.Dataset(list(images)), subset_size=CALIBRATION_IMAGES)
        openvino.save(net, path, "")
        native_int8.write(deploy, net, ours)
    return path, ours


def openvino_int8(name: str, batch: Tensor, folder: Path) -> Runner:
    from repvgg.deploy.engines import openvino

    options = Options(size(name), len(batch), threads=threads(name))
    return rival(openvino.open_file(int8_files(name, folder)[0], options), batch)


def compare(name: str, folder: Path, batch_size: int, natives: Sequence[str], rivals: Sequence[str], rounds: int = ROUNDS) -> Run:
    """Return the figures of one run: our nets and the rivals that are named, all taking turns.

    natives: precision and accuracy, such as "int16 high". rivals: an engine, and its precision where it is not float32.
    """
    path, model = model_file(name, folder), deploy_form(name)
    files = {"int8": int8_files(name, folder)[1]} if "int8 high" in natives else {}
    torch.manual_seed(0)  # after what draws other numbers, and not always
    images = torch.randn(IMAGES, *size(name))
    batch, judged = images[:batch_size], images[:4]
    pairs = list(map(str.split, natives))
    nets = [load(files.get(own, path), precision=own, accuracy=accuracy, threads=threads(name)) for own, accuracy in pairs]
    runners = {f"native {words}": native(net, batch) for words, net in zip(natives, nets, strict=True)}
    for words in rivals:
        engine, _, precision = words.partition(" ")
        options = Options(size(name), batch_size, precision or "fp32", threads(name))
        int8 = precision == "int8"
        runners[words] = openvino_int8(name, batch, folder) if int8 else rival(engines.build(engine, model, options), batch)
    wanted = reference.run(nets[0].layers, judged.numpy())
    errors = {key: reference.error(runner.answer(judged), wanted) for key, runner in runners.items()}
    slowest = max(once(runner.run) for runner in runners.values())
    calls = {key: runner.run for key, runner in runners.items()}
    times = interleave(calls, rounds=rounds, batches=max(1, int(TURN / slowest)), warmup=2)
    for key, t in times.items():
        say(f"{name}, batch {batch_size}: {key} {batch_size / t.median:.1f} img/s, error {errors[key]:.1e}")
    return {key: described(t, batch_size, errors[key]) for key, t in times.items()}


def once(run: Callable[[], Any]) -> float:
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def described(times: Times, batch_size: int, error: float) -> dict[str, Any]:
    speeds = [batch_size / seconds for seconds in times.by_round]
    return {"images_per_second": statistics.median(speeds), "by_round": speeds, "rms_error": error}


def all_engines(name: str, folder: Path) -> dict[str, Run]:
    """Return a run of many images and one of one image at a time, of every engine in every precision."""
    natives, rivals = ["fp32 high", "fp32 fast", "fp32 exact", "int16 high", "int16 fast", "int8 high"], [*RIVALS, "openvino int8"]
    if has_bf16():
        natives, rivals = [*natives, "bf16 high"], [*rivals, "openvino bf16"]
    return {f"batch {n}": compare(name, folder, n, natives, rivals) for n in (64 if name == MICRO else 32, 1)}


def has_bf16() -> bool:
    from repvgg_engine import instruction_sets

    return "bf16" in instruction_sets() and os.environ.get("REPVGG_ENGINE_ISA", "avx512") == "avx512"


def member(name: str, folder: Path) -> Run:
    return compare(name, folder, 8, ("fp32 high", "int16 high"), RIVALS, ROUNDS_OF_MEMBERS)


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


def avx2(folder: Path) -> dict[str, Run]:
    """Measure with AVX2 alone, in a process of its own, because oneDNN reads its limit when it is loaded."""
    call = "all_engines('repvgg_a0', Path(sys.argv[1]))"
    script = f"import json; from measure_engine import *; print(json.dumps({call}))"
    environment = {**os.environ, "REPVGG_ENGINE_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent)
    figures: dict[str, Run] = json.loads(done.stdout.splitlines()[-1])
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
PEAK = """
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
LARGE = ("repvgg_a2", "repvgg_b1", "repvgg_b3")  # as the first call of a process without a plan


def start(folder: Path) -> dict[str, Any]:
    """Return seconds from a process's start to its exit with one prediction, and its memory, without a plan (cold) and with one."""
    a0, onnx, found = model_file("repvgg_a0", folder), folder / "a0.onnx", {}
    onnx.write_bytes(to_onnx(deploy_form("repvgg_a0"), Signature((3, 224, 224))))
    engines_of_a0 = {"native": a0, "native cold": a0, "openvino": onnx}
    cases = [(f"{name}, batch {n}", file, n) for n in (1, 32) for name, file in engines_of_a0.items()]
    cases += [(f"native cold, {name}, batch 1", model_file(name, folder), 1) for name in LARGE]
    for words, file, batch_size in cases:
        answers = [first(words.replace(",", "").split()[0], file, batch_size, folder, "cold" in words) for _ in range(1 + REPEATS)]
        runs = answers[1:]  # the first found no plan, and no file in memory
        seconds, peak = statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)
        found[words] = {"n": REPEATS, "seconds": seconds, "spread": [min(runs)[0], max(runs)[0]], "peak_kib": peak}
        say(f"{words}: first answer after {seconds:.2f} s, peak {peak / 1024:.0f} MiB")
    return found


def first(name: str, file: Path, batch_size: int, folder: Path, cold: bool) -> tuple[float, int]:
    """Return seconds, and peak memory in KiB, of a process that answers once."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "REPVGG_ENGINE_CACHE": empty if cold else str(folder / "plans")}
        began = time.perf_counter()
        command = [sys.executable, "-c", FIRST[name] + PEAK, str(file), str(batch_size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return time.perf_counter() - began, int(done.stdout.split()[-1])


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
    "a0": partial(all_engines, "repvgg_a0"),
    "a2": partial(all_engines, "repvgg_a2"),
    "b0": partial(all_engines, "repvgg_b0"),
    "b1": partial(all_engines, "repvgg_b1"),
    "micro": partial(all_engines, MICRO),
    "avx2": avx2,
    "start": start,
    "against_resnets": against_resnets,
    "algorithms": algorithms,
}


def asked(words: Sequence[str], isa: str) -> list[str]:
    """Return the parts that are measured. isa: of REPVGG_ENGINE_ISA, by which no part may be overwritten that has all.

    Exits with a line where they cannot be.
    """
    if unknown := [word for word in words if word not in (*PARTS, *MEMBERS)]:
        sys.exit(f"no part {unknown[0]!r}: {', '.join((*PARTS, *MEMBERS))}")
    if not isa:
        return list(words) or [*PARTS, *MEMBERS]
    if isa != "avx2" or not set(words) <= {"a0", "avx2"} or not words:
        sys.exit(f"with REPVGG_ENGINE_ISA={isa} only a0 with avx2 is measured, as the part avx2: unset it for the others")
    return ["avx2"]


def main() -> None:
    torch.set_num_threads(THREADS)
    began = time.monotonic()
    parts = asked(sys.argv[1:], os.environ.get("REPVGG_ENGINE_ISA", ""))
    protocol = {"threads": THREADS, "rounds": ROUNDS, "rounds_of_members": ROUNDS_OF_MEMBERS, "about": __doc__}
    with tempfile.TemporaryDirectory() as folder:
        for word in parts:
            if not sys.argv[1:] and time.monotonic() - began > BUDGET:
                say(f"{word}: left out, for want of time; python results/measure_engine.py {word}")
                continue
            part, measure = (word, PARTS[word]) if word in PARTS else (f"members/{word}", partial(member, word))
            load_before = os.getloadavg()[0]
            keep(OUT, part, measure(Path(folder)), {"protocol": protocol}, load_before=load_before)
    if "algorithms" in (figures := json.loads(OUT.read_text())):
        draw(figures["algorithms"])


if __name__ == "__main__":
    main()
