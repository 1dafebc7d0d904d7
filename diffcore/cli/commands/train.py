"""`diffcore train`: train from a recipe or a YAML file, whose settings options override."""

from collections.abc import Sequence

from diffcore.cli.training.family_recipe import CHOICE
from diffcore.cli.training.recipes import recipe_names
from diffcore.cli.training.training_settings import build_trainer, parse_settings, training_parser
from diffcore.training.data.scan import shared_scans

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Train as the command line describes.

    Args:
        argv: command-line words after `train`.
    """
    parser = training_parser(
        "diffcore train",
        f"Train a network. Recipes: {', '.join(recipe_names())}; and {CHOICE}, the recipe of the "
        "family of --pipeline. Options override the settings of the recipe or file.",
    )
    with shared_scans():
        trainer = build_trainer(parser, parse_settings(parser, argv))
    trainer.train()
