"""Fold other people's networks, and record what became of each: results/compatibility.json and docs/compatibility.md.

    python results/measure_compatibility.py                  # every network that is not in the file yet; stop and start at will
    python results/measure_compatibility.py --only timm:repvgg_a0 timm:mobileone_s0 --again
    python results/measure_compatibility.py --speeds         # for twelve of them, on a machine that does nothing else
    python results/measure_compatibility.py --page           # docs/compatibility.md alone

Each network has random weights and random batch-norm statistics, and is measured by a process of its own. Packages that are not
ours are installed into an environment of their own (--environments), which borrows PyTorch from this one.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from layout import measured
from records import keep, stamps

HERE = Path(__file__).resolve().parent
FILE = HERE / "compatibility.json"
PAGE = HERE.parent / "docs" / "compatibility.md"
PACKAGES = {"transformers": "transformers", "smp": "segmentation-models-pytorch", "ultralytics": "ultralytics"}

TIMM = """
repvgg_a0 repvgg_a1 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b1g4 repvgg_d2se mobileone_s0 mobileone_s1 mobileone_s2
mobileone_s3 mobileone_s4 fastvit_t8 fastvit_sa12 fastvit_mci0 repvit_m0_9 repvit_m1 repvit_m1_5 ghostnetv3_050
ghostnetv3_100 ghostnetv2_100 ghostnet_100 repghostnet_050 repghostnet_100 mixnet_s mixnet_m tf_mixnet_s
inception_next_atto visformer_tiny nextvit_small coatnet_nano_rw_224 maxvit_nano_rw_256 efficientformer_l1
efficientformerv2_s0 starnet_s1 resnet18 resnet50 resnet50d resnetrs50 resnext50_32x4d wide_resnet50_2 resnetv2_50
res2net50_26w_4s densenet121 dla34 dpn68 vgg16_bn efficientnet_b0 efficientnetv2_s mobilenetv2_100 mobilenetv3_large_100
mobilenetv4_conv_small mnasnet_100 fbnetc_100 hardcorenas_a regnetx_002 regnety_002 regnetz_b16 rexnet_100
hrnet_w18_small cspresnet50 cspdarknet53 darknet53 ese_vovnet19b_dw hgnet_tiny hgnetv2_b0 lcnet_050 tinynet_a levit_128s
levit_conv_128s convmixer_768_32 xception41 inception_v3 inception_v4 nasnetalarge selecsls42b skresnet18
edgenext_xx_small gernet_s repvgg_b2g4 pit_ti_224 botnet26t_256 mobilevit_xxs tiny_vit_5m_224 efficientvit_b0
"""
TORCHVISION = """
resnet50 mobilenet_v3_large densenet121 googlenet shufflenet_v2_x1_0 mnasnet1_0 regnet_y_400mf
segmentation.deeplabv3_resnet50 segmentation.fcn_resnet50 detection.fasterrcnn_resnet50_fpn
detection.retinanet_resnet50_fpn detection.ssdlite320_mobilenet_v3_large
"""
OTHERS = [
    "transformers:RTDetrRepVggBlock",
    "transformers:DFineRepVggBlock",
    "smp:tu-repvgg_a0",
    "smp:mobileone_s0",
    "ultralytics:yolov9c",
    "ultralytics:yolov10n",
    "ultralytics:rtdetr-l",
    "ultralytics:yolo11n",
]
CASES = [*(f"timm:{n}" for n in TIMM.split()), *(f"torchvision:{n}" for n in TORCHVISION.split()), *OTHERS]
TIMED = """
repvgg_a0 mobileone_s0 mobileone_s1 fastvit_t8 repvit_m0_9 ghostnetv3_050 repghostnet_050 mixnet_s inception_next_atto
resnet50 densenet121 efficientnet_b0
"""


# -------------------------------------------------------------------------------------------------------------- one network


def create(case: str) -> tuple[Any, tuple[int, ...]]:
    """Return a network with random weights, and the shape of what it takes."""
    source, _, name = case.partition(":")
    if source == "timm":
        import timm

        model = timm.create_model(name)
        config = model.default_cfg
        side = config["input_size"][-1] if config.get("fixed_input_size") else 96
        return model, (4, 3, max(side, config.get("min_input_size", (3, 0, 0))[-1]), max(side, 0))
    if source == "torchvision":
        import torchvision

        kind, _, inner = name.rpartition(".")
        maker = getattr(torchvision.models, kind) if kind else torchvision.models
        options = {"weights_backbone": None} if kind else {}
        model = getattr(maker, inner)(weights=None, **options)
        return (model.backbone if kind == "detection" else model), (4, 3, 96, 96)
    if source == "smp":
        import segmentation_models_pytorch as smp

        return smp.Unet(name, encoder_weights=None), (4, 3, 96, 96)
    if source == "transformers":
        import transformers

        if name.startswith("RTDetr"):
            from transformers.models.rt_detr.modeling_rt_detr import RTDetrRepVggBlock

            config = transformers.RTDetrConfig()
            return RTDetrRepVggBlock(config), (4, int(config.encoder_hidden_dim * config.hidden_expansion), 24, 24)
        from transformers.models.d_fine.modeling_d_fine import DFineRepVggBlock

        return DFineRepVggBlock(transformers.DFineConfig(), 64, 64), (4, 64, 24, 24)
    from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

    return (RTDETRDetectionModel if "rtdetr" in name else DetectionModel)(f"{name}.yaml", verbose=False), (4, 3, 128, 128)


def measure(case: str) -> dict[str, Any]:
    """Fold one network in float64, and compare."""
    import torch

    sys.path.insert(0, str(HERE.parent / "tests"))
    from conftest import randomize

    import repvgg
    from repvgg.fold.rounding import tensors

    torch.manual_seed(0)
    model, shape = create(case)
    model = randomize(model.double(), shape)
    started = time.perf_counter()
    folded: Any = repvgg.reparameterize(model)
    seconds = time.perf_counter() - started
    x = torch.randn(2, *shape[1:], dtype=torch.float64)
    with torch.no_grad():
        wanted, got = tensors(model(x)), tensors(folded(x))
        nudged = tensors(model(x * (1 + 2**-52)))
    off = max((float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)), default=0.0)
    own = max((float((g - w).abs().max() / w.abs().max()) for g, w in zip(nudged, wanted, strict=True)), default=0.0)
    left = Counter(folded.fold_report.left.values())
    found = {"before": _count(model), "after": _count(folded), "error": off, "own": own, "seconds": round(seconds, 2)}
    return found | {"left": dict(left.most_common())} | _of_theirs(case)


def _count(model: Any) -> list[int]:
    from torch import nn

    modules = list(model.modules())
    return [sum(isinstance(m, kind) for m in modules) for kind in (nn.Conv2d, nn.modules.batchnorm._BatchNorm)]


def _of_theirs(case: str) -> dict[str, Any]:
    """Convolutions and batch norms after the package's own fusion, where it has one."""
    model, _ = create(case)
    model.eval()
    if case.startswith("timm:") and any(hasattr(m, "reparameterize") or hasattr(m, "fuse") for m in model.modules()):
        from timm.utils.model import reparameterize_model

        return {"theirs": _count(reparameterize_model(model))}
    if case.startswith("ultralytics:"):
        return {"theirs": _count(model.fuse(verbose=False))}
    return {}


# --------------------------------------------------------------------------------------------------------------- all of them


def python_for(source: str, environments: Path) -> str:
    """Return the Python that has a package: this one, or one of its own that borrows what this one has."""
    if source not in PACKAGES:
        return sys.executable
    home = environments / source
    python = home / "bin" / "python"
    if new := not python.exists():
        venv.create(home, with_pip=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # each time: another checkout may have made it
    if new:  # pip sees what is borrowed, and leaves it out
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGES[source]], check=True)
    return str(python)


def run(case: str, environments: Path) -> dict[str, Any]:
    """Measure one network in a process of its own; what goes wrong there is the result."""
    try:
        python = python_for(case.partition(":")[0], environments)
        done = subprocess.run(
            [python, __file__, "--one", case],
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
            env={**os.environ, "PYTHONPATH": str(HERE.parent / "src")},  # this checkout's
        )
    except (subprocess.SubprocessError, OSError) as error:
        return {"failed": str(error)[:200]}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def time_one(case: str) -> dict[str, Any]:
    """Images a second in ONNX Runtime, before and after, taking turns."""
    import torch

    import repvgg
    from repvgg.bench.models import randomise_norms
    from repvgg.deploy.engines import Options, Signature
    from repvgg.deploy.engines.graph import to_onnx
    from repvgg.deploy.engines.onnxruntime import open_file
    from repvgg.measure.timing import interleave, ratio

    model, _ = create(case)
    model, size = randomise_norms(model), (3, 224, 224)
    forms = {
        "before": to_onnx(model, Signature(size), merge_norms=True),
        "after": to_onnx(repvgg.reparameterize(model), Signature(size)),
    }
    engines = {form: open_file(file, Options(size)) for form, file in forms.items()}
    images = torch.randn(1, *size)
    calls = {form: partial(engine.run, engine.prepare(images)) for form, engine in engines.items()}
    times = interleave(calls, rounds=10, batches=5)
    gain = ratio(times["before"], times["after"])
    return {"before_ms": times["before"].median * 1e3, "after_ms": times["after"].median * 1e3, "gain": str(gain)}


# ------------------------------------------------------------------------------------------------------------------ the page


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/compatibility.md."""
    networks = results["networks"]
    lines = [
        "# Networks of others",
        "",
        "Generated by `python results/measure_compatibility.py` from `results/compatibility.json`: random weights, random",
        "batch-norm statistics, float64. *Own*: by how much a change of the input in its last digit changes the original's output.",
        "*Theirs*: after the package's own fusion, where it has one. *Left*: the two commonest reasons for which batch norms are",
        "left, each with how many. Of torchvision's detectors it is the backbone, as their own forward cannot be followed.",
        "",
        "| network | convs, BNs | after `reparameterize` | theirs | error | own | left |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in (c for c in CASES if c in networks):
        r = networks[case]
        if "failed" in r:
            lines.append(f"| {case} | | | | | | failed: {r['failed'].replace('|', '/')} |")
            continue
        left = "; ".join(f"{n}x {why}" for why, n in list(r["left"].items())[:2]).replace("|", "/")
        theirs = "{}, {}".format(*r["theirs"]) if "theirs" in r else "-"
        lines.append(
            "| {} | {}, {} | {}, {} | {} | {:.0e} | {:.0e} | {} |".format(
                case, *r["before"], *r["after"], theirs, r["error"], r["own"], left
            )
        )
    done = [r for r in networks.values() if "failed" not in r]
    normed = [r for r in done if r["before"][1]]
    clean, without = sum(r["after"][1] == 0 for r in normed), len(done) - len(normed)
    told = f"{len(normed)} networks with batch norms: {clean} have none left. {without} had none before."
    lines += ["", f"{told} {len(networks) - len(done)} could not be measured."]
    lines += ["", measured(stamps(results, "networks"))]
    if "speeds" in results:
        lines += ["", "Milliseconds an image in ONNX Runtime, whose own conv+BN fusion is on in both:", ""]
        lines += ["| network | before | after | gain |", "|---|---|---|---|"]
        lines += [f"| {c} | {s['before_ms']:.2f} | {s['after_ms']:.2f} | {s['gain']} |" for c, s in results["speeds"].items()]
        lines += ["", measured(stamps(results, "speeds"))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=CASES, metavar="NETWORK")
    parser.add_argument("--again", action="store_true", help="measure what is in the file already, too")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "repvgg" / "environments")
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--time-one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one or asked.time_one:
        print(json.dumps(measure(asked.one) if asked.one else time_one(asked.time_one)))
        return
    if asked.speeds:
        for case in (f"timm:{n}" for n in TIMED.split()):
            done = subprocess.run([sys.executable, __file__, "--time-one", case], capture_output=True, text=True, check=True)
            speeds = json.loads(done.stdout.strip().splitlines()[-1])
            keep(FILE, f"speeds/{case}", speeds)
            print(case, speeds, flush=True)
    elif not asked.page:
        there = json.loads(FILE.read_text())["networks"] if FILE.exists() else {}
        for case in asked.only:
            if asked.again or "error" not in there.get(case, {}):
                network = run(case, asked.environments)
                keep(FILE, f"networks/{case}", network)
                print(case, network, flush=True)
    PAGE.write_text(page(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
