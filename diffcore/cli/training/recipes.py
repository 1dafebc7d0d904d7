"""Recipes and other YAML files of settings: their names and their content."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from diffcore.io.plain_data import read_yaml

__all__ = ["find_settings", "read_settings", "recipe_names"]

RECIPES = files("diffcore.recipes")


def recipe_names() -> list[str]:
    """List the recipes that diffcore contains.

    Returns:
        Their names, sorted.
    """
    return sorted(Path(path.name).stem for path in RECIPES.iterdir() if path.name.endswith(".yaml"))


def find_settings(name: str) -> Path:
    """Find the file of a recipe, or check that a YAML file exists.

    Args:
        name: name of a recipe, or path of a YAML file.

    Returns:
        The path of the file.

    Raises:
        ValueError: there is neither such a recipe nor such a file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{path} does not exist: expected a YAML file or a recipe ({', '.join(recipe_names())})"
        )
    if name not in recipe_names():
        raise ValueError(
            f"there is no recipe {name!r}: expected a YAML file or one of "
            f"{', '.join(recipe_names())}"
        )
    return Path(str(RECIPES / f"{name}.yaml"))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file.

    Args:
        path: file to read.

    Returns:
        Its content as plain data.

    Raises:
        ValueError: the file is not YAML, or is not a table of settings; the message names the file.
    """
    return read_yaml(path)
