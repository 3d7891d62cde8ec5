"""`repvgg`: which command is meant, and how it ends.

Exit codes: 0 done, 2 bad input (one line says what and how to mend it), 129, 130 and 143 stopped by SIGHUP, Ctrl-C and SIGTERM.
REPVGG_DEBUG=1 shows the traceback of an error.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from repvgg.cli.flags import Settings, process, say
from repvgg.cli.parse import UsageError, parse, suggestion
from repvgg.disk import out_of_memory
from repvgg.train.recipes import Recipe, get_recipe
from repvgg.version import __version__

DESCRIPTION = f"repvgg {__version__}: train a multi-branch RepVGG, fold it exactly into plain 3x3 convolutions, use it."
COMMANDS = {
    "demo": "look.Demo",
    "info": "look.Info",
    "engines": "look.Engines",
    "recipe": "look.ShowRecipe",
    "train": "training.Train",
    "report": "look.Report",
    "eval": "using.Eval",
    "convert": "files.Convert",
    "predict": "using.Predict",
    "export": "files.Export",
    "web": "look.Web",
    "push": "files.Push",
    "quantize": "training.Quantize",
    "prune": "training.Prune",
    "bench": "measuring.Bench",
    "bench-data": "measuring.BenchData",
    "index": "measuring.WriteIndex",
    "ablate": "training.Ablate",
    "paper": "measuring.Paper",
}
WITH_RECIPE = ("train", "prune", "ablate")
EXPECTED = (ValueError, FloatingPointError, OSError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `repvgg` command."""
    for name, code in (("SIGTERM", 143), ("SIGHUP", 129)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(getattr(signal, name), lambda *_, code=code: sys.exit(code))
    try:
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where a reader that has left is noticed
    except KeyboardInterrupt as stopped:
        _fail(str(stopped) or "stopped; what was saved last is whole", 128 + getattr(stopped, "signal", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has left: end quietly, as rich does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("REPVGG_DEBUG"):
            raise
        _fail(_told(error), 1 if isinstance(error, ConnectionError) else 2)  # 1: another process of a distributed run is gone


def _run(words: list[str]) -> None:
    if words in (["--version"], ["-V"]):
        print(f"repvgg {__version__}")
        return
    if not words or words[0] in ("-h", "--help"):
        _print_overview()
        return
    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}: {suggestion(name, COMMANDS) or 'see repvgg --help'}")
    defaults = {"settings": Settings(**vars(_default_recipe(rest)))} if name in WITH_RECIPE else {}
    parse(_command(name), name, rest, **defaults).run()


def _command(name: str) -> Any:
    module, _, command = COMMANDS[name].partition(".")
    return getattr(import_module(f"repvgg.cli.{module}"), command)


def _print_overview() -> None:
    """Print the commands, each with the first line of its help."""
    print(f"{DESCRIPTION}\n\nusage: repvgg COMMAND ...        (repvgg COMMAND --help: its flags, and an example)\n")
    for name in COMMANDS:
        print(f"  {name:<10}{_command(name).__doc__.splitlines()[0]}")
    print("\nExample: repvgg demo --out demo")


def _default_recipe(words: list[str]) -> Recipe:
    """Return the recipe whose values the flags start from: the one named, or what suits the data."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--recipe", "--data", "--init"):
        parser.add_argument(flag, default="")
    try:
        named, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:  # tyro will say it better
        return Recipe()
    if named.recipe or not named.data or "--help" in words or "-h" in words:
        return get_recipe(named.recipe or ("finetune" if named.init else "light"))
    from repvgg.data import open_source

    source = open_source(named.data)
    if named.init and not source.masks:
        return get_recipe("finetune")
    say(f"recipe: {source.recipe}")
    return get_recipe(source.recipe)


def _told(error: Exception) -> str:
    """Return what to say of an error: what went wrong and, where it is known, the remedy."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs {error.name}: pip install 'repvgg[all]'"
    if out_of_memory(error):
        return "out of memory: take a smaller --batch-size or --workers 0, or free some memory, and start it again"
    if isinstance(error, EXPECTED):
        return str(error)
    return f"{type(error).__name__}: {str(error) or 'no reason given'} (REPVGG_DEBUG=1 shows where)"


def _fail(reason: str, code: int) -> NoReturn:
    say(f"repvgg{f' (process {process()})' if process() else ''}: {' '.join(reason.split())[:2000]}")
    sys.exit(code)
