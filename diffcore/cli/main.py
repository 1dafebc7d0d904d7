"""The command `diffcore`. It imports one command's module only, so that its help needs no torch."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from diffcore import __version__
from diffcore.cli.arguments import extract_option, normalize_options
from diffcore.io.mistakes import is_mistake, is_out_of_memory, one_line
from diffcore.io.streams import spell_what_streams_lack

__all__ = ["main"]

COMMANDS = {
    "train": "train a network from a recipe or a YAML file of settings",
    "distil": "train a generator of few steps from a run or a diffusers pipeline",
    "sample": "draw samples from a run or a diffusers pipeline, as images or arrays",
    "serve": "draw samples for requests over HTTP, which share evaluations of the network",
    "evaluate": "compare samples of a run, a pipeline or a folder with real images",
    "compare": "compare samplers, steps and guidance on the network of a run or a pipeline",
    "tune": "find the closest sampler and knots for a network and few evaluations",
    "likelihood": "measure the bits per dimension of data under a run or a pipeline",
    "features": "train a classifier whose features evaluations compare",
    "export": "save the network of a run as a diffusers pipeline",
    "lora": "merge, extract or convert an adapter, or name the moved pipeline of a run",
    "ema": "reconstruct an average of the weights of any length after training",
    "consolidate": "write weights of a run or checkpoint as one safetensors file",
    "doctor": "find faults of a training before it starts, or of the config of a pipeline",
    "plot": "draw noise schedules, loss weights, and effective weights of training settings",
    "report": "write the report of a run as one page of HTML",
    "playground": "try schedules, samplers and guidance in the browser",
    "info": "describe a run, or this machine",
}


class _CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. A mistake of the user is reported in one line on stderr, or with a traceback
    if DIFFCORE_TRACEBACK=1 is set.

    Args:
        argv: command-line words; default: those of this program.

    Returns:
        The exit status: 0, or 1 after an error, or 130 after an interruption.

    Raises:
        SystemExit: options are unknown (status 2), or a signal ended a training that is saved (128
            plus the number of the signal).
        Exception: a bug, of diffcore or of the user's own modules, which keeps its traceback.
    """
    spell_what_streams_lack()
    parser = _CommandParser(
        prog="diffcore",
        description="Train diffusion models and draw samples from them.",
        epilog="`diffcore COMMAND --help` describes the options of a command. `--trust MODULE` "
        "lets the settings of any command name classes of one of your modules, which may lie in "
        "the current folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffcore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    arguments, words = parser.parse_known_args(argv)
    modules: list[str] = []
    try:
        modules, words = extract_option(
            normalize_options(words),
            "trust",
            "the name of a module whose classes the configuration may name",
        )
        _run(arguments.command, words, modules)
    except Exception as error:
        if os.environ.get("DIFFCORE_TRACEBACK") or not is_mistake(error, modules):
            raise
        print(f"diffcore {arguments.command}: error: {_describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"diffcore {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(command: str, words: Sequence[str], modules: Sequence[str]) -> None:
    from diffcore.io.trust import trust

    with trust(*modules, remedy="add --trust {}"):
        import_module(f"diffcore.cli.commands.{command}").main(words)


def _describe(error: Exception) -> str:
    if is_out_of_memory(error):
        return one_line(
            "the device has too little memory: use a smaller network or --batch-size, or smaller "
            f"parts of a batch (--accumulation, --micro-batch): {error}"
        )
    return one_line(str(error))
