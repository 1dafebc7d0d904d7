"""The parser of command lines and plain data into components; errors name the nearest spelling.

A configuration can name the classes that `diffcore.io.trust` lists, and others only if the user
trusts their modules by name: neither a configuration nor the folder of a run can make Python import
or call something else.
"""

import ast
import difflib
import re
import sys
import textwrap
from abc import ABC
from collections.abc import Callable, Sequence
from inspect import isabstract, isclass, signature
from itertools import pairwise
from typing import Any, NoReturn

from jsonargparse import (
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    _typehints,
    set_parsing_settings,
)

from diffcore.io.extras import EXTRAS, missing
from diffcore.io.mistakes import one_line, passes_through
from diffcore.io.trust import trusted_modules  # its import enforces what settings may name

__all__ = ["ComponentParser", "SpecError"]

UNION_WITH_NONE = re.compile(
    r"Does not validate against.*?- (.*?)\n\s*- Expected a <class 'NoneType'>.*", re.DOTALL
)
NAMED_KEY = re.compile(r'Parser key "([^"]*)"')
NOT_TRUSTED = re.compile(
    r"(importing '.*? is not allowed.*?|a (?:function|network) is given in Python.*?)"
    r"(?=\. Got value|\n|$)"
)
MISSING_PACKAGE = re.compile(r"import of (\w+)[\w.]* halted|No module named '(\w+)")
UNKNOWN_CLASS = re.compile(r"(?<=import path string: )[\w.]+")
OPTIMIZER_LR = re.compile(r"\"optimizer\": Option 'lr' is not accepted")
UNKNOWN_OPTION = re.compile(r"(?:(?<=ption ')|(?<=arguments: --))[\w.]+")


class SpecError(ValueError):
    """Settings do not fit the signature of the class that they configure."""


class ComponentHelp(DefaultHelpFormatter):
    """Help with types by name, defaults as constructor calls, and short lists of subclasses."""

    def _expand_help(self, action: Any) -> str:
        text = super()._expand_help(action)
        for pattern, replacement in HELP_REPLACEMENTS.items():
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        return text


def _shorten_list(match: re.Match[str]) -> str:
    paths = [path.strip() for path in match[1].split(",")]
    if any(path.startswith("torch.nn.") for path in paths):
        return ", a class of diffusers such as UNet2DModel, of torch.nn, or of yours with --trust"
    own = [path for path in paths if path.startswith("diffcore.")]
    names = ", ".join(path.rpartition(".")[2] for path in own)
    others = ", or a class of yours with --trust" if len(own) < len(paths) else ""
    return f", one of: {names}{others}" if own else ""


def _print_default(match: re.Match[str]) -> str:
    try:
        return _as_call(ast.literal_eval(match[0]))
    except ValueError:  # it holds what is no literal, such as inf
        return match[0]


def _as_call(value: Any) -> str:
    """The constructor call of a spec; the repr of other values."""
    if not isinstance(value, dict) or "class_path" not in value:
        return repr(value)
    arguments = [f"{name}={_as_call(item)}" for name, item in value.get("init_args", {}).items()]
    return f"{value['class_path'].rpartition('.')[2]}({', '.join(arguments)})"


HELP_REPLACEMENTS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r",? *known subclasses:(.*?)(?=\)$|$)": _shorten_list,
    r"(?<=default: )\{'class_path'.*\}": _print_default,
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r", default: Unset": "",
    r"default: (?=\)$)": "default: empty",
}


class ComponentParser(ArgumentParser):
    """A jsonargparse parser that builds trusted classes only and reports errors in one line.

    Args:
        *args: positional arguments of jsonargparse's parser.
        **kwargs: keyword arguments of jsonargparse's parser. With `exit_on_error=False` errors are
            raised as SpecError.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=ComponentHelp, allow_abbrev=False, **kwargs)

    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Any:
        """Parse a command line; `--sampler.help` without a class lists the classes.

        Args:
            args: command-line words; None: those of this program.
            *rest: passed on to jsonargparse.
            **options: passed on to jsonargparse.

        Returns:
            The settings by name.
        """
        words = list(sys.argv[1:] if args is None else args)
        for word, following in pairwise([*words, "-"]):
            if word.endswith(".help") and following.startswith("-"):
                self._list_classes(word)
        return super().parse_args(words, *rest, **options)

    def _list_classes(self, option: str) -> None:
        """Print the classes that the component of a help option may have, and exit."""
        action = self._option_string_actions.get(option)
        base = next((t for t in getattr(action, "_help_types", ()) if isclass(t)), None)
        members = [] if base is None else sorted(_members(base), key=lambda cls: cls.__name__)
        if not members:
            return
        print(f"Classes of {option.removesuffix('.help')}; {option} CLASS describes the options:")
        for cls in members:
            summary = " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split())
            print(f"  {cls.__name__:<22} {textwrap.shorten(summary, 75, placeholder=' …')}")
        self.exit(0)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with status 2, or raise SpecError if `exit_on_error` is False.

        Args:
            message: jsonargparse's message, on several lines.
            ex: exception that caused it, if any.

        Returns:
            Never.
        """
        if ex is not None and passes_through(ex, trusted_modules()):
            raise ex
        line = one_line(self._explain(message))
        if not self.exit_on_error:
            raise SpecError(line) from ex
        self.exit(2, f"{self.prog}: error: {line}\n")
        raise AssertionError("exit returned")

    def instantiate(
        self, namespace: Namespace, instantiate_groups: bool = True, *, instantiators: Any = None
    ) -> Namespace:
        """Build the components of parsed settings.

        Args:
            namespace: result of a `parse_` method.
            instantiate_groups: whether groups of options are built too.
            instantiators: passed on to jsonargparse.

        Returns:
            The namespace with components in place of their settings.

        Raises:
            ValueError: a component refuses its options.
        """
        try:
            return super().instantiate(namespace, instantiate_groups, instantiators=instantiators)
        except ValueError as error:
            raise ValueError(UNION_WITH_NONE.sub(r"\1", str(error))) from error

    def _explain(self, message: str) -> str:
        """The message in one line, with the extra to install or the nearest spelling."""
        absent = MISSING_PACKAGE.search(message)
        if absent and (package := absent[1] or absent[2]) in EXTRAS:
            return str(missing(package, "A class that is named in the settings"))
        if denied := NOT_TRUSTED.search(message):
            key = NAMED_KEY.match(message)
            return f"{key[1] + ': ' if key else ''}{denied[0]}"
        message = " ".join(UNION_WITH_NONE.sub(r"\1", message).split())
        if OPTIMIZER_LR.search(message):
            return f"{message}: use lr.peak"
        if not (UNKNOWN_CLASS.search(message) or UNKNOWN_OPTION.search(message)):
            return message  # without a search through all classes: a union has many such errors
        classes, words = _known_classes(), set(re.findall(r"\w+", message))
        named = [cls for name, cls in classes.items() if name in words]
        keys = list(self.get_defaults().keys(branches=True))
        options = [option for cls in named for option in _option_names(cls)]
        options += [*keys, *(key.rpartition(".")[2] for key in keys)]
        for pattern, candidates in ((UNKNOWN_CLASS, list(classes)), (UNKNOWN_OPTION, options)):
            if (word := pattern.search(message)) and (near := _nearest(word.group(), candidates)):
                return f"{message} (did you mean {near!r}?)"
        return message


def _option_names(cls: type) -> list[str]:
    """The parameters of a class; [] for a built-in one without a signature."""
    try:
        return list(signature(cls).parameters)
    except ValueError:
        return []


def _discard_options_of_other_class(_parser: Any, before: Any, after: Any) -> None:
    """Let a component of another class begin with its own defaults."""
    first, second = (
        str(value.get("class_path")).rpartition(".")[2] for value in (before or {}, after)
    )
    if first not in ("None", second):
        before["init_args"] = type(before)()


set_parsing_settings(
    unset_sentinel=True,
    instantiate_subclass_spec_in_any=False,
    subclasses_enabled=[ABC],  # a component derives from ABC; a plain dataclass is a group
)
# jsonargparse keeps options whose names agree: P2 in place of MinSNR(5) would silently get γ = 5.
_typehints.discard_init_args_on_class_path_change = _discard_options_of_other_class


def _members(base: type) -> set[type]:
    """The concrete classes of diffcore below a base class."""
    return {
        cls
        for cls in _known_classes().values()
        if issubclass(cls, base)
        and cls is not base
        and not isabstract(cls)
        and not cls.__name__.startswith("_")
        and cls.__module__.startswith("diffcore.")
    }


def _known_classes() -> dict[str, type]:
    """The classes of all imported modules of diffcore, by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("diffcore.")]
    return {
        name: value for module in modules for name, value in vars(module).items() if isclass(value)
    }


def _nearest(word: str, candidates: list[str]) -> str | None:
    """The candidate closest to a word or to its last dotted part."""
    by_lower_case = {candidate.lower(): candidate for candidate in reversed(candidates)}
    for part in (word, word.rpartition(".")[2]):
        close = difflib.get_close_matches(part, candidates, n=1) or [
            by_lower_case[name]
            for name in difflib.get_close_matches(part.lower(), by_lower_case, n=1)
        ]
        if close and close[0] != word:
            return close[0]
    return None
