"""Help for those who will run an exported file, written beside it: how images are prepared, and a program that does it.

The program needs the file's own runtime, NumPy and Pillow, and nothing of ours.
"""

import re

from repvgg.models.manifest import Manifest, Preprocessing

# By format: what to import, and the lines from `images` to `logits`.
RUN = {
    "onnx": ("onnxruntime", 'session = onnxruntime.InferenceSession(FILE)\nlogits = session.run(None, {"images": images})[0]'),
    "openvino": ("openvino", 'model = openvino.Core().compile_model(FILE, "CPU")\nlogits = model(images)[0]'),
    "ncnn": (
        "ncnn",
        'net = ncnn.Net()\nnet.load_param(FILE)\nnet.load_model(FILE.removesuffix(".param") + ".bin")\n'
        "extractor = net.create_extractor()\n"
        'extractor.input("images", ncnn.Mat(images[0]))\nlogits = np.array(extractor.extract("logits")[1])[None]',
    ),
    "mnn": (
        "MNN",
        'net = MNN.nn.load_module_from_file(FILE, ["images"], ["logits"])\n'
        "placed = MNN.expr.placeholder(list(images.shape), MNN.expr.data_format.NCHW)\n"
        "placed.write(images)\nlogits = net.forward([placed])[0].read()",
    ),
    "native": ("repvgg_engine", 'net = repvgg_engine.load(FILE, precision="int8")\nlogits = net(images)'),
    "pt2": (
        "torch",
        "program = torch.export.load(FILE).module()  # executes what is in the file: open your own alone\n"
        "logits = program(torch.from_numpy(images)).detach().numpy()",
    ),
    "aotinductor": (
        "torch",
        "program = torch._inductor.aoti_load_package(FILE)  # executes what is in the file: open your own alone\n"
        "logits = program(torch.from_numpy(images)).detach().numpy()",
    ),
}

PROGRAM = '''"""Run {name} on a photo: python {name}.py photo.jpg (needs {module}, numpy and pillow)."""

import json
import sys
from pathlib import Path

import {module}
import numpy as np
from PIL import Image, ImageOps

FILE = str(Path(__file__).with_suffix(""))
{prepare}
{run}

scores = np.exp(logits[0] - logits[0].max())
labels = json.loads(Path(FILE + ".json").read_text())["labels"] or range(len(scores))
for i in np.argsort(-scores)[:5]:
    print(f"{{labels[i]}}  {{scores[i] / scores.sum():.1%}}")
'''


def preparation(p: Preprocessing, pixels: bool, resized: bool) -> list[str]:
    """Return in words what is done to an image before it goes in. resized: the graph itself resizes images of the input's size."""
    channels, height, width = p.input_size
    steps = [
        f"decode as {'RGB' if channels == 3 else 'grey' if channels == 1 else f'{channels} channels'}, as a viewer would show it"
    ]
    if resized:
        steps.append(f"make it {width} x {height} pixels")
    else:
        steps += [
            f"resize the short side to {p.resize} pixels, {p.interpolation}, antialiased",
            f"crop the centre, {width} x {height}",
        ]
    if pixels:
        steps.append("leave the pixels as they are, 0 to 255")
    else:
        steps += ["divide by 255", f"subtract the mean {list(p.mean)}, divide by the standard deviation {list(p.std)}"]
    return [*steps, "order as [image, channel, row, column]"]


def program(name: str, to: str, manifest: Manifest, batch: int | None, pixels: bool, resized: bool) -> str | None:
    """Return a program that runs an exported file on a photo; None for one that gives masks, or takes what no photo has."""
    p = manifest.preprocessing
    channels, height, width = p.input_size
    if manifest.task == "masks" or to not in RUN or channels not in (1, 3):
        return None
    mode = "RGB" if channels == 3 else "L"
    lines = [
        "image = ImageOps.exif_transpose(Image.open(sys.argv[1]))",
        "if image.has_transparency_data:",
        '    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))',
        f'image = image.convert("{mode}")',
    ]
    if resized:
        lines.append(f"image = image.resize(({width}, {height}))")
    else:
        lines += [
            f"size = [int({p.resize} * side / min(image.size)) for side in image.size]",
            f"image = image.resize(size, Image.Resampling.{p.interpolation.upper()})",
            f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
            f"image = image.crop((left, top, left + {width}, top + {height}))",
        ]
    if pixels:
        lines.append(f"pixels = np.asarray(image).reshape({height}, {width}, {channels})")
    else:
        lines += [
            f"mean, std = np.array({list(p.mean)}, np.float32), np.array({list(p.std)}, np.float32)",
            f"pixels = (np.asarray(image, np.float32).reshape({height}, {width}, {channels}) / 255 - mean) / std",
        ]
    lines.append("images = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])")
    if batch and batch > 1:
        lines.append(f"images = images.repeat({batch}, axis=0)  # the file is for so many at a time")
    module, run = RUN[to]
    name = re.sub(r"[^\w.+ -]", "_", name, flags=re.ASCII)  # it goes into the program's text
    return PROGRAM.format(name=name, module=module, prepare="\n".join(lines), run=run)
