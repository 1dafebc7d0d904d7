"""`diffcore distil`: train a generator of few steps from a run or a diffusers pipeline."""

from diffcore.cli.commands.distil.command import main

__all__ = ["main"]
