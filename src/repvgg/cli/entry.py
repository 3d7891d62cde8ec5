"""`repvgg`: which command is meant, and how it ends.

Exit codes: 0 done, 2 an error (one line says what and how to mend it), 129, 130 and 143 stopped by SIGHUP, Ctrl-C and SIGTERM,
1 another process of the training is gone, or nobody reads the output.
REPVGG_DEBUG=1 shows the traceback of an error.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from repvgg import terminal
from repvgg.cli.flags import Settings, complain, process
from repvgg.cli.parse import UsageError, flags, parse, suggestion
from repvgg.disk import out_of_memory
from repvgg.train.recipes import FIELDS, resolve
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
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "repvgg_engine": "./engine"}  # where the name is another than the module's
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
        _fail(str(stopped) or "stopped; all saved files are intact", 128 + getattr(stopped, "signal", signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has left: end quietly, as rich does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("REPVGG_DEBUG"):
            raise
        _fail(_told(error), 1 if isinstance(error, ConnectionError) else 2)  # 1: another process of a distributed run is gone


def _run(words: list[str]) -> None:
    words = _loudness(words)
    if words in (["--version"], ["-V"]):
        print(f"repvgg {__version__}")
        return
    if not words or words[0] in ("-h", "--help"):
        _print_overview()
        return
    if words[0] == "--print-completion":
        from repvgg.cli.completion import script

        print(script(words[1] if len(words) > 1 else "bash", {name: sorted(flags(_command(name))) for name in COMMANDS}))
        return
    understood(words).run()


def understood(words: list[str]) -> Any:
    """Return the command that these words describe, ready to run. Raises `UsageError`."""
    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}: {suggestion(name, COMMANDS) or 'see repvgg --help'}")
    defaults = {"settings": _settings(rest)} if name in WITH_RECIPE else {}
    return parse(_command(name), name, rest, **defaults)


def _loudness(words: list[str]) -> list[str]:
    """Take -q and -v out of the words: no remarks but errors, or the libraries' remarks too, and where an error was."""
    terminal.quiet = bool({"-q", "--quiet"} & set(words))
    if {"-v", "--verbose"} & set(words):
        import logging

        logging.basicConfig(level=logging.INFO)
        os.environ["REPVGG_DEBUG"] = "1"
    return [word for word in words if word not in ("-q", "--quiet", "-v", "--verbose")]


def _command(name: str) -> Any:
    module, _, command = COMMANDS[name].partition(".")
    return getattr(import_module(f"repvgg.cli.{module}"), command)


def _print_overview() -> None:
    """Print the commands, each with the first line of its help."""
    print(f"{DESCRIPTION}\n\nusage: repvgg COMMAND ...        (repvgg COMMAND --help: its flags, and an example)\n")
    for name in COMMANDS:
        print(f"  {name:<12}{_command(name).__doc__.splitlines()[0]}")
    print("\n  -q, -v      after any command: only errors; or the libraries' messages too, and tracebacks")
    print("  --print-completion bash|zsh: prints a script that completes commands and flags in that shell")
    print("\nExample: repvgg demo --out demo")


def _settings(words: list[str]) -> Settings:
    """Return the fields of a recipe that these words give, over the recipe that they name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="")
    try:
        named = parser.parse_known_args(words)[0].recipe
    except argparse.ArgumentError:  # tyro will say it better
        named = ""
    shown = resolve("light" if named in ("", "auto") else named)
    flags = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    given = dict.fromkeys(name for flag in flags for name in (flag, flag.removeprefix("no_")) if name in FIELDS)
    return Settings.over(shown, tuple(given))


def _told(error: Exception) -> str:
    """Return what to say of an error: what went wrong and, where it is known, the remedy."""
    if isinstance(error, ModuleNotFoundError) and error.name == "fcntl":
        return "this needs Linux or macOS: on Windows use WSL"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs {error.name}: pip install {PACKAGES.get(error.name, error.name)}"
    if out_of_memory(error):
        return "out of memory: take a smaller --batch-size or --workers 0, or free some memory, and start it again"
    if isinstance(error, EXPECTED):
        return str(error)
    return f"{type(error).__name__}: {str(error) or 'no reason given'} (REPVGG_DEBUG=1 shows where)"


def _fail(reason: str, code: int) -> NoReturn:
    complain(f"repvgg{f' (process {process()})' if process() else ''}: {' '.join(reason.split())[:2000]}")
    sys.exit(code)
