"""python -m repvgg_engine predict FILE IMAGE...

Exit codes: 0 done, 2 bad input (one line says what).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repvgg_engine import EngineError, Net, load
from repvgg_engine.net import ACCURACIES, PRECISIONS


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m repvgg_engine", description="Run a RepVGG in deploy form on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    predict_parser = commands.add_parser("predict", help="print labels and probabilities of images")
    predict_parser.add_argument("file", help="a model file in deploy form (.safetensors)")
    predict_parser.add_argument("images", nargs="+")
    predict_parser.add_argument("--top", type=int, default=5)
    predict_parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    predict_parser.add_argument("--accuracy", default="high", choices=ACCURACIES)
    predict_parser.add_argument("--threads", type=int, help="by default, as many as this process may use processors")
    predict_parser.add_argument("--json", action="store_true")
    words = parser.parse_args(argv)
    try:
        net = load(words.file, precision=words.precision, accuracy=words.accuracy, threads=words.threads)
        predict(net, words.images, words.top, words.json)
    except EngineError as error:
        print(f"repvgg_engine: {error}", file=sys.stderr)
        sys.exit(2)


def predict(net: Net, paths: Sequence[str], top: int, as_json: bool) -> None:
    """Print the likeliest classes of each image."""
    from repvgg_engine.images import read_image

    assert net.preprocessing is not None
    if top < 1:
        raise EngineError(f"--top is {top}: it is at least 1")
    for path in paths:
        logits = net(read_image(Path(path), net.preprocessing)[None])[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[:top]
        labels = [(net.classes[i] if net.classes else str(i), float(probabilities[i])) for i in best]
        if as_json:
            print(json.dumps({"path": path, "labels": labels}))
        else:
            print(path, *(f"{name} {p:.1%}" for name, p in labels), sep="  ")


if __name__ == "__main__":
    main()
