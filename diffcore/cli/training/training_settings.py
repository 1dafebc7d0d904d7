"""Training settings of a command line: recipes or YAML files, which options override."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from diffcore import distillation  # noqa: F401  its components become known to the parser
from diffcore.cli.arguments import extract_option, wants_help
from diffcore.cli.completion import complete_settings
from diffcore.cli.training.family_recipe import CHOICE, choose_recipe, expand_options
from diffcore.cli.training.finetuning import (
    localize_pipeline,
    make_pipelines_absolute,
    trains_pipeline,
)
from diffcore.cli.training.recipes import find_settings, read_settings, recipe_names
from diffcore.io.parser import ComponentParser
from diffcore.run import Run
from diffcore.training.trainer import Trainer

__all__ = ["build_trainer", "parse_content", "parse_settings", "training_parser"]


def training_parser(prog: str, description: str, usage: str = "") -> ComponentParser:
    """Create the parser of a command that reads the settings of a training.

    Args:
        prog: name of the command.
        description: what the command does, for its help.
        usage: usage of the command; "": that of a command whose first word is a recipe or a file.

    Returns:
        The parser, to which the command may add its own options.
    """
    parser = ComponentParser(
        prog=prog,
        usage=usage or f"{prog} [RECIPE | FILE.yaml] [--option value ...]",
        description=description,
        epilog="Trainings of a pipeline also take `--data IMAGES` for --data.folder, `--lora RANK` "
        "for --network.lora.rank with the learning rate and the steps of an adapter, "
        "`--text_lora RANK` for an adapter of the text encoders, `--token '<cat>=cat'` for "
        "a new word that starts from another one, and `--resolution PIXELS` for --data.size. "
        "`--trust MODULE` lets the settings name classes of one of your modules, which may lie in "
        "the current folder.",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; options override it"
    )
    parser.add_argument(
        "--pipeline",
        default=None,
        help="diffusers pipeline that the training starts from: its network, its data encoder and "
        "its process complete the settings of the recipe or file. It is a folder, an id on a hub, "
        "or with `--pipeline-config FOLDER` a single .safetensors checkpoint",
    )
    parser.add_class_arguments(Trainer, skip={"config"})
    return parser


def parse_settings(parser: ComponentParser, argv: Sequence[str]) -> Namespace:
    """Parse the settings of a training, and complete those that a pipeline determines.

    Args:
        parser: parser that `training_parser` created.
        argv: command-line words; the first may be a recipe or a YAML file.

    Returns:
        The settings as plain data.

    Raises:
        ValueError: no settings are named, a file is not found, or a pipeline is missing.
    """
    if not argv:
        names = ", ".join(recipe_names())
        raise ValueError(f"name a recipe ({names}) or a YAML file, or see --help")
    return _parse(parser, _move_files_first(argv))


def parse_content(
    parser: ComponentParser, content: Mapping[str, Any], argv: Sequence[str], name: str
) -> Namespace:
    """Parse the settings of a training whose first file is content that a command has made.

    Args:
        parser: parser that `training_parser` created.
        content: settings as plain data, which files and options override.
        argv: command-line words, with --config for further files.
        name: name of a recipe, or of the file that the content stands for.

    Returns:
        The settings as plain data.

    Raises:
        ValueError: a file is not found, or a pipeline is missing.
    """
    files, words = extract_option(argv, "config", "a YAML file")
    further = [read_settings(find_settings(file)) for file in files]
    return _parse(parser, _configs_first([dict(content), *further], words, name))


def _parse(parser: ComponentParser, words: list[str]) -> Namespace:
    settings = parser.parse_args(words)
    make_pipelines_absolute(settings)
    return settings


def build_trainer(parser: ComponentParser, settings: Namespace) -> Trainer:
    """Build the trainer of parsed settings.

    Args:
        parser: parser that `training_parser` created.
        settings: settings that `parse_settings` returned, without options of the command's own.

    Returns:
        The trainer, which has not started.

    Raises:
        ValueError: a setting is out of range, or the data does not fit the process.
    """
    config = parser.dump(settings.clone().update(False, "resume"))
    arguments = parser.instantiate(settings).as_dict() | {"config": config}
    del arguments["pipeline"]
    return Trainer(**arguments)


def _move_files_first(argv: Sequence[str]) -> list[str]:
    """The command line with all files in front, so that options override them from anywhere."""
    files, words = extract_option(argv, "config", "a YAML file")
    if words and not words[0].startswith("-"):
        files.insert(0, words.pop(0))
    words = words if wants_help(words) else localize_pipeline(words)
    if files[:1] == [CHOICE] and wants_help(words):
        files = []
    elif files[:1] == [CHOICE]:
        files[0] = choose_recipe(words)
    paths = [find_settings(file) for file in files]
    contents = [read_settings(path) for path in paths]
    if paths and _is_config_of_moved_run(paths[-1], contents[-1]):
        words = [f"--folder={paths[-1].parent}", *words]
    return _configs_first(contents, words, files[0]) if files else words


def _configs_first(contents: list[dict[str, Any]], words: list[str], name: str) -> list[str]:
    """The command line with the contents of files in front, of which the first is completed."""
    if trains_pipeline(contents[0]):
        words = expand_options(words)
    if not wants_help(words):
        contents = [complete_settings(contents, words, name), *contents[1:]]
    # Not their paths: jsonargparse would read the files in the encoding of the locale.
    configs = [yaml.safe_dump(content, sort_keys=False) for content in contents]
    return [f"--config={config}" for config in configs] + words


def _is_config_of_moved_run(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a file is the config.yaml of a run that lies in another folder than at its start."""
    run = Run(path.parent)
    if path.name != run.config.name or not run.checkpoints.is_dir():
        return False
    return Path(str(settings.get("folder"))).resolve() != path.parent.resolve()
