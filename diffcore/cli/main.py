"""The command `diffcore`. A sub-command is imported when it is named: help and version need neither torch nor diffusers."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from diffcore import __version__


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


COMMANDS = {
    "train": "train a network: a recipe's name or a YAML file, then options",
    "sample": "sample a run: images, arrays, or a labelled grid",
    "export": "write a run as a pipeline of diffusers",
    "plot": "draw schedules, loss weights, and the effective weight of a training config",
    "info": "describe a run, or this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error of the user's is one line on stderr and exit status 2, or 1.

    DIFFCORE_TRACEBACK=1 in the environment shows where it came from.
    """
    parser = Parser(
        prog="diffcore", description="Diffusion models whose numbers are right.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"diffcore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    args, rest = parser.parse_known_args(argv)
    try:
        import_module(f"diffcore.cli.{args.command}").main(rest)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("DIFFCORE_TRACEBACK"):
            raise
        print(f"diffcore {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"diffcore {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
