"""python -m repvgg_engine predict FILE IMAGE...
python -m repvgg_engine bench FILE --batch-size 1,32 --against openvino,onnxruntime

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
    predict_parser = commands.add_parser("predict", help="labels and probabilities of images")
    bench_parser = commands.add_parser("bench", help="images a second, beside other engines")
    for command in (predict_parser, bench_parser):
        command.add_argument("file", help="a model file in deploy form (.safetensors)")
        command.add_argument("--precision", default="fp32", choices=PRECISIONS)
        command.add_argument("--accuracy", default="high", choices=ACCURACIES)
        command.add_argument("--threads", type=int, help="by default, all processors that this process may use")
        command.add_argument("--json", action="store_true")
    predict_parser.add_argument("images", nargs="+")
    predict_parser.add_argument("--top", type=int, default=5)
    bench_parser.add_argument("--batch-size", default="1,32", help="several with commas")
    bench_parser.add_argument("--against", default="", help="openvino, onnxruntime, ncnn, mnn; several with commas")
    bench_parser.add_argument("--rounds", type=int, default=7, help="in each, every engine has its turn")
    words = parser.parse_args(argv)
    try:
        net = load(words.file, precision=words.precision, accuracy=words.accuracy, threads=words.threads)
        if words.command == "predict":
            predict(net, words.images, words.top, words.json)
        else:
            sizes = [int(n) if n.strip().isdigit() else 0 for n in words.batch_size.split(",")]
            bench(net, words.file, sizes, [n for n in words.against.split(",") if n], words.rounds, words.json)
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


def bench(net: Net, file: str, sizes: Sequence[int], against: Sequence[str], rounds: int, as_json: bool) -> None:
    """Print speeds, each engine's with its quartiles, this engine's ratio to it and its error."""
    from repvgg_engine.bench import bench as run
    from repvgg_engine.bench import ratio

    results = {}
    for batch_size in sizes:
        speeds = run({"repvgg_engine": net}, against, batch_size, rounds)
        ours = speeds["repvgg_engine"]
        results[batch_size] = {
            name: {
                "images_per_second": s.median,
                "quartiles": s.quartiles,
                "ours_over_it": ratio(ours, s),
                "rms_error": s.error,
            }
            for name, s in speeds.items()
        }
        if as_json:
            continue
        print(f"{file}, {net.precision}, batch {batch_size}, {net.threads} thread{'s' if net.threads > 1 else ''}")
        for name, s in speeds.items():
            low, high = s.quartiles
            times = "" if s is ours else f"   repvgg_engine is {ratio(ours, s):.2f} times as fast"
            print(f"  {name:14}{s.median:8.1f} img/s ({low:.1f} to {high:.1f})   rms error {s.error:.1e}{times}")
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
