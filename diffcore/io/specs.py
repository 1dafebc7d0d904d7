"""Specs: plain data {class_path, init_args} that names a component, and the parsers that read it.

A spec is what YAML and JSON hold. Reading one can name components of diffcore, torch and diffusers, and nothing else
unless a module is trusted by name: neither a config nor a run folder can make Python import something of its own.
"""

import difflib
import math
import pydoc
import re
import sys
from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from inspect import isclass, isroutine, signature
from typing import Any, NoReturn, TypeVar

from jsonargparse import (
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    _typehints,
    set_parsing_settings,
)

from diffcore.io.extras import EXTRAS, missing

T = TypeVar("T")
TRUSTED = ["diffcore", "torch", "diffusers"]
NONE_OF_UNION = r"Does not validate against.*?- (.*?)\n\s*- Expected a <class 'NoneType'>.*"
NOT_IMPORTED = r"import of (\w+)[\w.]* halted|No module named '(\w+)"
COMPLAINTS = [
    r"(?<=ption ')[\w.]+",
    r"(?<=arguments: --)[\w.]+",
    r"(?<=import path string: )[\w.]+",
]


def trust(*modules: str) -> None:
    """Let specs name classes of these modules too; the current folder becomes importable for them."""
    if modules and "" not in sys.path:
        sys.path.append("")
    set_parsing_settings(
        unset_sentinel=True,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *modules],
        subclasses_enabled=[
            ABC
        ],  # a component has an abstract base; a plain dataclass is a group of options
    )


def _forget(_parser: Any, before: Any, after: Any) -> None:
    """A component of another class begins with its own defaults."""
    first, second = (
        str(value.get("class_path")).rpartition(".")[2] for value in (before or {}, after)
    )
    if first not in ("None", second):
        before["init_args"] = type(before)()


trust()
# jsonargparse keeps the options whose names agree, so that P2 in place of MinSNR would silently have its gamma of 5.
_typehints.discard_init_args_on_class_path_change = _forget


def spec(value: Any) -> Any:
    """Plain data that `build` reads back to an equal value: the name and the fields of each component."""
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {f.name: spec(getattr(value, f.name)) for f in fields(value) if f.init}
        return (
            {"class_path": _name(type(value)), "init_args": arguments}
            if isinstance(value, ABC)
            else arguments
        )
    if isinstance(value, (tuple, list)):
        return [spec(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return (
            "-.inf" if value < 0 else ".inf" if value > 0 else ".nan"
        )  # JSON has none; YAML spells them so
    return value


def build(kind: type[T], data: Mapping[str, Any]) -> T:
    """The component of class `kind` whose spec is `data`.

    Raises:
        ValueError: a key or a value does not fit the signature; the message names it and the nearest name.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"got {data!r}, expected the fields of a {kind.__name__}")
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(kind, "value")
    try:
        return parser.instantiate(parser.parse_object({"value": dict(data)})).value
    except SpecError as error:
        raise ValueError(
            str(error).replace('"value.', '"').replace("Group 'value'", kind.__name__)
        ) from None


def _name(kind: type) -> str:
    """Our own classes go by their name alone, so that one may move between files."""
    return (
        kind.__name__
        if kind.__module__.startswith("diffcore.")
        else f"{kind.__module__}.{kind.__qualname__}"
    )


class SpecError(ValueError):
    """A spec that does not fit, in one line."""


class Help(DefaultHelpFormatter):
    """Help without the lists of every known subclass of torch's and diffusers' modules."""

    def _expand_help(self, action: Any) -> str:
        text = super()._expand_help(action)
        return re.sub(r",? *known subclasses:(.*?)(?=\)$|$)", _few, text, flags=re.S)


def _few(match: re.Match[str]) -> str:
    names = [name.strip().split(".")[-1] for name in match.group(1).split(",")]
    return "" if len(names) > 12 else f", one of: {', '.join(names)}"


class Parser(ArgumentParser):
    """A jsonargparse parser whose errors are one line and name the nearest spelling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = self._one_line(message)
        if not self.exit_on_error:
            raise SpecError(line) from ex
        self.exit(2, f"{self.prog}: error: {line}\n")
        raise AssertionError("exit returned")

    def instantiate(
        self, namespace: Namespace, instantiate_groups: bool = True, *, instantiators: Any = None
    ) -> Namespace:
        """The components; a name of torch or diffusers must be a class, for a function that it calls could do anything."""
        for path in _named(namespace.as_dict()):
            if not isclass(pydoc.locate(path)) and path.partition(".")[0] in TRUSTED:
                self.error(
                    f"{path} is not a class: name one, or a function of a module that you --trust"
                )
        try:
            return super().instantiate(namespace, instantiate_groups, instantiators=instantiators)
        except ValueError as error:
            raise ValueError(re.sub(NONE_OF_UNION, r"\1", str(error), flags=re.DOTALL)) from None

    def _one_line(self, message: str) -> str:
        absent = re.search(NOT_IMPORTED, message)
        if absent and (package := absent[1] or absent[2]) in EXTRAS:
            return str(missing(package, "A class that is named in the settings"))
        message = re.sub(NONE_OF_UNION, r"\1", message, flags=re.DOTALL)
        return " ".join(message.split()) + self._hint(message)

    def _hint(self, message: str) -> str:
        """The nearest known name to the word that the message complains of."""
        names = self._names(message)
        for word in re.findall("|".join(COMPLAINTS), message):
            close = [
                name
                for part in (word, word.split(".")[-1])
                for name in difflib.get_close_matches(part, names, n=1)
            ]
            if "did you mean" not in message and close and close[0] != word:
                return f" (did you mean {close[0]!r}?)"
        return ""

    def _names(self, message: str) -> list[str]:
        modules = [module for name, module in sys.modules.items() if name.startswith("diffcore.")]
        known = {
            name: value
            for module in modules
            for name, value in vars(module).items()
            if isclass(value)
        }
        named = [cls for name, cls in known.items() if re.search(rf"\b{name}\b", message)]
        arguments = [argument for cls in named for argument in signature(cls).parameters]
        keys = [
            key
            for path in self.get_defaults().keys(branches=True)
            for key in (path, path.split(".")[-1])
        ]
        return [*arguments, *known, *keys]


def _named(value: Any) -> Iterator[str]:
    """Every import path in parsed settings: class paths, and functions given where a callable is expected."""
    if isinstance(value, Mapping):
        if isinstance(path := value.get("class_path"), str):
            yield path
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _named(item)
    elif isroutine(value):
        yield f"{value.__module__}.{value.__qualname__}"
