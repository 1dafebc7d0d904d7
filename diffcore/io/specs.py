"""Specs: plain data {class_path, init_args} that names a component, as YAML and JSON hold it."""

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

from diffcore.io.parser import ComponentParser, SpecError

__all__ = ["describe_component", "describe_spec", "from_spec", "to_spec"]

T = TypeVar("T")


def to_spec(value: Any) -> Any:
    """Convert components to plain data that `from_spec` reads back to equal values.

    Args:
        value: component, plain dataclass, sequence or table of them, or plain data, which stays as
            it is.

    Returns:
        `{class_path, init_args}` for a component, the fields for a plain dataclass. Non-finite
        floats become the strings of YAML, such as ".inf", because JSON has none.
    """
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {f.name: to_spec(getattr(value, f.name)) for f in fields(value) if f.init}
        if isinstance(value, ABC):
            return {"class_path": _class_path(type(value)), "init_args": arguments}
        return arguments
    if isinstance(value, (tuple, list)):
        return [to_spec(item) for item in value]
    if isinstance(value, dict):
        return {name: to_spec(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "-.inf" if value < 0 else ".inf" if value > 0 else ".nan"
    return value


def describe_spec(spec: Any, leaf: Callable[[Any], str] = str) -> str:
    """Plain data as text: a component as `Class(option=value)`, other tables as `name value`.

    Args:
        spec: plain data, as `to_spec` returns it.
        leaf: text of a value that is no table.

    Returns:
        The text, without line breaks of its own.

    Example:
        >>> describe_spec({"class_path": "CFG", "init_args": {"scale": 2.0}})
        'CFG(scale=2.0)'
    """
    if not isinstance(spec, dict):
        return leaf(spec)
    if "class_path" not in spec:
        return ", ".join(f"{name} {describe_spec(value, leaf)}" for name, value in spec.items())
    options = (spec.get("init_args") or {}).items()
    named = ", ".join(f"{name}={describe_spec(value, leaf)}" for name, value in options)
    return f"{spec['class_path']}({named})"


def describe_component(component: Any) -> str:
    """A component as its constructor call, without the arguments that are defaults.

    The first argument is stated even if it is the default, unless it is 0 or has to be named:
    `UniPC(2)`, `Heun()`, `Cosine()`. A class with a text of its own keeps it.

    Args:
        component: component, or another value, which is printed by `repr`.

    Returns:
        The text.
    """
    if isinstance(component, tuple):
        return f"({', '.join(map(describe_component, component))},)"
    if not is_dataclass(component) or isinstance(component, type):
        return repr(component)
    shown = [field for field in fields(component) if field.repr]
    name = type(component).__name__
    every = ", ".join(f"{field.name}={getattr(component, field.name)!r}" for field in shown)
    if repr(component) != f"{name}({every})":
        return repr(component)
    arguments = []
    for index, field in enumerate(shown):
        value = getattr(component, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        is_first = index == 0 and not field.kw_only
        if (is_first and value) or value != default:
            text = describe_component(value)
            arguments.append(text if is_first else f"{field.name}={text}")
    return f"{name}({', '.join(arguments)})"


def from_spec(cls: type[T], settings: Mapping[str, Any]) -> T:
    """Build an instance of a class from plain data.

    Args:
        cls: dataclass to build.
        settings: its arguments by name; a component is given as such or as its spec. Or the spec of
            an instance of a subclass, {class_path, init_args}.

    Returns:
        The instance.

    Raises:
        ValueError: a key or a value does not fit the signature; the message names it and the
            nearest spelling.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"got {settings!r}, expected the fields of a {cls.__name__}")
    arguments = {name: to_spec(value) for name, value in settings.items()}
    parser = ComponentParser(exit_on_error=False)
    if "class_path" in settings:
        parser.add_subclass_arguments(cls, "value")
    else:
        parser.add_class_arguments(cls, "value")
    try:
        return parser.instantiate(parser.parse_object({"value": arguments})).value
    except SpecError as error:
        message = (
            str(error)
            .removeprefix("value.")
            .replace('"value.', '"')
            .replace("Group 'value'", cls.__name__)
        )
        raise ValueError(message) from None


def _class_path(cls: type) -> str:
    """The name of a diffcore class, which may move between files; the path of any other class."""
    if cls.__module__.startswith("diffcore."):
        return cls.__name__
    return f"{cls.__module__}.{cls.__qualname__}"
