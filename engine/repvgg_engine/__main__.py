"""python -m repvgg_engine predict FILE IMAGE... [--plan PLAN]
python -m repvgg_engine plan FILE > PLAN

Exit codes: 0 done, 2 bad input (one line says what).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from repvgg_engine import EngineError, Net, load, plan
from repvgg_engine.loader import ACCURACIES
from repvgg_engine.net import PRECISIONS


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m repvgg_engine", description="Run a RepVGG in deploy form on the CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    predict_parser = commands.add_parser("predict", help="print labels and probabilities of images")
    plan_parser = commands.add_parser(
        "plan", help="print the plan of a model for this machine: which algorithm computes each layer"
    )
    for command in (predict_parser, plan_parser):
        command.add_argument("file", help="a model file in deploy form (.safetensors)")
        command.add_argument("--precision", default="fp32", choices=PRECISIONS)
        command.add_argument("--accuracy", default="high", choices=ACCURACIES)
        command.add_argument("--threads", type=int, help="by default, as many as this process may use processors")
    predict_parser.add_argument("images", nargs="+")
    predict_parser.add_argument("--top", type=int, default=5)
    predict_parser.add_argument(
        "--plan", help="a file that `plan` printed: nothing is measured, and the bits are those of any such run"
    )
    predict_parser.add_argument("--json", action="store_true")
    words = parser.parse_args(argv)
    try:
        options = {"precision": words.precision, "accuracy": words.accuracy, "threads": words.threads}
        if words.command == "plan":
            print(plan(words.file, **options).to_json(), end="")
            return
        net = load(words.file, plan=words.plan, **options)
        predict(net, words.images, words.top, words.json)
        sys.stdout.flush()  # here, where a reader that has left is noticed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (EngineError, OSError, MemoryError) as error:
        print(f"repvgg_engine: {shown(str(error) or 'out of memory')}", file=sys.stderr)
        sys.exit(2)


def shown(text: str) -> str:
    """Return text as one line that a terminal shows and does not obey: names of files and classes are strangers' words."""
    line, encoding = "".join(c if c.isprintable() else "?" for c in text), sys.stdout.encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def predict(net: Net, paths: Sequence[str], top: int, as_json: bool) -> None:
    """Print the likeliest classes of each image. Raises `EngineError` for a net that has none."""
    if top < 1:
        raise EngineError(f"--top is {top}: it is at least 1")
    for path in paths:
        labels = net.classify(path, top)
        if as_json:
            print(json.dumps({"path": path, "labels": labels}))
        else:
            print(shown(path), *(f"{shown(name)} {p:.1%}" for name, p in labels), sep="  ")


if __name__ == "__main__":
    main()
