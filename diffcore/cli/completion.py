"""Completion of settings: what the first file leaves to a pipeline or to a folder of images."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from diffcore.cli import image_settings
from diffcore.cli.arguments import extract_option
from diffcore.cli.training import finetuning

__all__ = ["complete_settings"]


def complete_settings(
    contents: Sequence[Mapping[str, Any]], words: Sequence[str], file: str
) -> dict[str, Any]:
    """Complete the settings of a training's first file.

    Args:
        contents: contents of the settings files, the first one first.
        words: command-line words after the files, which override them.
        file: name of the first file, for messages.

    Returns:
        The settings of the first file with those that its pipeline or its images define. Further
        files and the command line override both.

    Raises:
        ValueError: The pipeline or the folder of images is missing, cannot be read, or contradicts
            the settings.
    """
    settings = dict(contents[0])
    options, _ = extract_option(words, "pipeline", "the folder of a diffusers pipeline")
    folder = finetuning.find_pipeline(settings, options[-1] if options else "", file)
    if folder:
        recipe = "" if Path(file).is_file() else file
        overrides = _given(contents[1:], words)
        return finetuning.complete_settings(settings, folder, overrides, recipe)
    if image_settings.are_incomplete(settings):
        return image_settings.complete_settings(settings, _given(contents, words))
    return settings


def _given(contents: Sequence[Mapping[str, Any]], words: Sequence[str]) -> dict[str, Any]:
    """The settings of files and command line by dotted name; the last one of a name counts.

    The class of a component has the name of the component, and its arguments follow: data,
    data.folder.
    """
    given: dict[str, Any] = {}
    for content in contents:
        given |= dict(_flat(content, ""))
    for word, value in pairwise([*words, "--"]):
        option, equals, text = word.partition("=")
        if option.startswith("--") and (equals or not value.startswith("--")):
            name = option.removeprefix("--").replace(".init_args", "").removesuffix(".class_path")
            given[name] = _parsed(text if equals else value)
    return given


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name == "class_path":
            yield prefix.removesuffix("."), value
        elif isinstance(value, Mapping):
            yield from _flat(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parsed(text: str) -> Any:
    """The value of an option; the parser of the command reports what is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
