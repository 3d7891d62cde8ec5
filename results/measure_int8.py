"""Measure the cost of INT8 on CIFAR-10, plain and with each remedy, and its gain on A0 at 224 px; write results/int8.json.

python results/measure_int8.py accuracy src/repvgg/models/cifar10.safetensors hf:../shared/data/cifar10 [REMEDY ...]
python results/measure_int8.py speed                       # on a machine that does nothing else
"""

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from records import keep, say

from repvgg import create_model, load
from repvgg.data import Decoded, open_source
from repvgg.data import Source as Images
from repvgg.deploy import native_int8
from repvgg.deploy.quantize import BATCH, INT8, Quantization, quantize
from repvgg.models.manifest import Preprocessing
from repvgg.models.zoo import manifest_of, remember

OUT = Path(__file__).with_name("int8.json")
QAT_IMAGES = 10_000  # a fifth of the training images, for an epoch
REMEDIES = {
    "plain": Quantization(bias_correction="none"),
    "bias correction": Quantization(),
    "full bias correction": Quantization(bias_correction="full"),
    "equalised": Quantization(equalise=True),
    "first and last in float": Quantization(keep=(0, -1)),
    "at most 0.1 points lost": Quantization(max_drop=0.001),
    "trained with rounding": Quantization(qat_epochs=1),
}


ALSO = {"plain": ("onnx", "native"), "bias correction": ("onnx",)}  # beside OpenVINO, for which all remedies are measured


def accuracy(file: str, data: str, remedies: list[str]) -> None:
    source = open_source(data)
    source = replace(source, train=source.limited(QAT_IMAGES).train)
    for remedy in remedies or list(REMEDIES):
        for to in ("openvino", *ALSO.get(remedy, ())):
            model = load(file).float()  # the embedded one is stored in half precision
            with tempfile.TemporaryDirectory() as folder:
                report = quantize(model, source, to, folder, settings=REMEDIES[remedy], log=say)
                plan = {"plan": planned(report.path)} if to == native_int8.ENGINE else {}
            figures = {
                "arch": (manifest_of(model).arch or {}).get("name"),
                "top1": {"float": report.before.top1, "int8": report.after.top1},
                "images": report.after.images,
                "kept_in_float": report.kept,
                "lowest_snr": min(layer.snr for layer in report.layers),
                "settings": asdict(report.settings),
                "constants_folded": True,  # before NNCF, which corrects no other bias in OpenVINO's networks
                **plan,
            }
            keep(OUT, f"accuracy/{remedy}, {to}", figures)


def planned(file: Path) -> list[str]:
    """Return the algorithm of each layer by which the native engine computed the accuracy; its plan is kept: none is made."""
    runner = native_int8.runner(load(file), "int8", BATCH)
    runner(torch.zeros(1, *runner.options.input_size))
    return list(runner.engine.run.chosen)  # type: ignore[attr-defined]


def speed() -> None:
    """A0 with random weights, on random pixels."""
    torch.set_num_threads(2)
    model = create_model("repvgg_a0", num_classes=10).train()
    model(torch.randn(8, 3, 224, 224))  # gives the batch norms statistics
    pixels = torch.randint(0, 256, (32, 3, 224, 224), dtype=torch.uint8)
    images = Decoded(pixels, [i % 10 for i in range(32)])
    preprocessing = Preprocessing((3, 224, 224), 224)
    source = Images("random pixels", images, images, [str(i) for i in range(10)], preprocessing)
    remember(model.eval(), replace(manifest_of(model), preprocessing=preprocessing))
    for to in INT8:
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(model, source, to, folder, settings=Quantization(images=32), log=say)
        say(f"{to}: {report.speedup.images_per_second}, {report.speedup.ratio}")
        keep(OUT, f"speed/{to}", {"model": "repvgg_a0", "input_size": [3, 224, 224], **report.speedup.to_json()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        speed()
    else:
        accuracy(sys.argv[2], sys.argv[3], sys.argv[4:])
