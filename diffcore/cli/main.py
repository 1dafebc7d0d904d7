"""The command `diffcore`. It imports one command's module only, so that its help needs no torch."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from diffcore import __version__
from diffcore.cli.arguments import extract_option, normalize_options

__all__ = ["main"]

COMMANDS = {
    "train": "train a network from a recipe or a YAML file of settings",
    "sample": "draw samples from a run or a diffusers pipeline, as images or arrays",
    "export": "save the network of a run as a diffusers pipeline",
    "ema": "reconstruct an average of the weights of any length after training",
    "plot": "draw noise schedules, loss weights, and effective weights of training settings",
    "report": "write the report of a run as one page of HTML",
    "info": "describe a run, or this machine",
}


class _CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Errors are one line on stderr, or a traceback if DIFFCORE_TRACEBACK=1 is set.

    Args:
        argv: command-line words; default: those of this program.

    Returns:
        The exit status: 0, or 1 after an error, or 130 after an interruption. Unknown options exit
        with status 2.
    """
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
    try:
        _trust_modules_and_run(arguments.command, words)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("DIFFCORE_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        print(f"diffcore {arguments.command}: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"diffcore {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _trust_modules_and_run(command: str, words: Sequence[str]) -> None:
    modules, words = extract_option(
        normalize_options(words),
        "trust",
        "the name of a module whose classes the configuration may name",
    )
    from diffcore.io.trust import trust

    with trust(*modules, remedy="add --trust {}"):
        import_module(f"diffcore.cli.{command}").main(words)


if __name__ == "__main__":
    sys.exit(main())
