"""Optional dependencies: the error that names the extra to install."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["EXTRAS", "MissingExtraError", "has_extra", "import_extra", "missing"]

EXTRAS = {
    "bitsandbytes": "optimizers",
    "datasets": "data",
    "diffusers": "diffusers",
    "fastapi": "serve",
    "gradio": "ui",
    "matplotlib": "plot",
    "peft": "lora",
    "schedulefree": "optimizers",
    "sklearn": "train",
    "tensorboard": "train",
    "torchao": "optimizers",
    "transformers": "diffusers",
    "uvicorn": "serve",
}
"""Import name of each optional dependency -> the extra of diffcore that installs it."""


class MissingExtraError(ImportError, ValueError):
    """An optional dependency is not installed, which is an error of installation and not a bug."""


def import_extra(name: str, purpose: str, extra: str | None = None) -> Any:
    """Import a module of an optional dependency.

    Args:
        name: dotted name of the module, such as `"sklearn.datasets"`.
        purpose: what needs it, as the subject of the error message, such as `"The digits data
            set"`.
        extra: extra that installs it; default: the one of `EXTRAS`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the distribution is not installed; the message contains the command that
            installs it.

    Example:
        >>> import_extra("json", "This example", extra="train").loads("1")
        1
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise missing(package, purpose, extra) from None


def missing(package: str, purpose: str, extra: str | None = None) -> MissingExtraError:
    """The error for an optional dependency that is not installed.

    Args:
        package: import name of the dependency.
        purpose: what needs it, as the subject of the message.
        extra: extra that installs it; default: the one of `EXTRAS`.

    Returns:
        The error, ready to be raised.
    """
    extra = extra or EXTRAS[package]
    return MissingExtraError(
        f"{purpose} needs the package {package!r}, which is not installed: "
        f"pip install 'diffcore[{extra}]'",
        name=package,
    )


def has_extra(package: str) -> bool:
    """Whether an optional dependency is installed; it is not imported."""
    return find_spec(package) is not None
