"""`diffcore train`: train from a recipe or a YAML file, whose settings options override."""

from collections.abc import Sequence

import yaml

from diffcore.cli.arguments import extract_option
from diffcore.cli.finetuning import complete_settings, find_pipeline
from diffcore.cli.recipes import find_settings, read_settings, recipe_names
from diffcore.io.parser import ComponentParser
from diffcore.training.trainer import Trainer

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Train as the command line describes.

    Args:
        argv: command-line words after `train`.
    """
    if not argv:
        names = ", ".join(recipe_names())
        raise ValueError(f"name a recipe ({names}) or a YAML file, or see --help")
    parser = _parser()
    settings = parser.parse_args(_move_files_first(argv))
    config = parser.dump(settings.clone().update(False, "resume"))
    arguments = parser.instantiate(settings).as_dict() | {"config": config}
    del arguments["pipeline"]
    trainer: Trainer = Trainer(**arguments)
    trainer.train()


def _parser() -> ComponentParser:
    parser = ComponentParser(
        prog="diffcore train",
        usage="diffcore train [RECIPE | FILE.yaml] [--option value ...]",
        description=f"Train a network. Recipes: {', '.join(recipe_names())}. Options override the "
        "settings of the recipe or file.",
        epilog="`--trust MODULE` lets the settings name classes of one of your modules, which may "
        "lie in the current folder.",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; options override it"
    )
    parser.add_argument(
        "--pipeline",
        default=None,
        help="folder of a diffusers pipeline that the training starts from: its network, its data "
        "encoder and its process complete the settings of the recipe or file",
    )
    parser.add_class_arguments(Trainer, skip={"config"})
    return parser


def _move_files_first(argv: Sequence[str]) -> list[str]:
    """The command line with all files in front, so that options override them from anywhere."""
    files, words = extract_option(argv, "config", "a YAML file")
    if words and not words[0].startswith("-"):
        files.insert(0, words.pop(0))
    paths = [find_settings(file) for file in files]
    configs = [str(path) for path in paths]
    contents = [read_settings(path) for path in paths]
    if contents and not {"-h", "--help"} & set(words):
        options, _ = extract_option(words, "pipeline", "the folder of a diffusers pipeline")
        folder = find_pipeline(contents[0], options[-1] if options else "", files[0])
        if folder:
            configs[0] = yaml.safe_dump(complete_settings(contents[0], folder), allow_unicode=True)
    return [f"--config={config}" for config in configs] + words
