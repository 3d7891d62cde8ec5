"""What a user waits for besides the network: process start, import, load, fold, decode. Writes results/startup.json.

python results/measure_startup.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg import create_model, reparameterize, save
from repvgg.measure.machine import write_record

ROUNDS = 7
NETWORK = """
import time, torch, repvgg
from repvgg.data.images import decode
from repvgg.data.transforms import eval_transform, normalise
model = repvgg.load({model!r})
image = normalise(eval_transform(model.manifest.preprocessing)(decode({image!r}))[None], model.manifest.preprocessing)
with torch.inference_mode():
    start = time.perf_counter(); model(image); print(time.perf_counter() - start)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, image = str(Path(folder) / "a0.safetensors"), str(Path(folder) / "image.jpg")
        net = create_model("repvgg_a0").eval()
        start = time.perf_counter()
        deploy = reparameterize(net)
        fold = time.perf_counter() - start
        save(deploy, model)
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(image)
        cli = str(Path(sys.executable).with_name("repvgg"))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import repvgg": [sys.executable, "-c", "import repvgg"],
            "import torch": [sys.executable, "-c", "import torch"],
            "repvgg --help": [cli, "--help"],
            "repvgg predict, one image": [cli, "predict", model, image],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        network = []
        for _ in range(ROUNDS + 1):  # the first warms the file cache
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
            script = NETWORK.format(model=model, image=image)
            network.append(float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout))
    median = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    first_call = statistics.median(network[1:])
    figures = {
        "what": "seconds from process start to exit, RepVGG-A0 at 224 px, warm file cache; medians of n rounds",
        "n": ROUNDS,
        "seconds": median,
        "spread": {name: [min(s[1:]), max(s[1:])] for name, s in seconds.items()},
        "network_first_call": first_call,
        "predict_outside_the_network": median["repvgg predict, one image"] - first_call,
        "fold_a0": fold,
    }
    write_record(Path(__file__).with_name("startup.json"), figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
