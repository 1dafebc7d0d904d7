"""`diffcore playground`: settings, pictures, the commands that repeat them, and the page."""

from diffcore.cli.commands.playground.command import main

__all__ = ["main"]
