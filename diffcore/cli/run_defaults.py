"""Commands whose first argument is a run, which brings the defaults of their options, and whose
components may be spelled as constructor calls, as tables print them.

    DPMSolverPP("2M")              {class_path: DPMSolverPP, init_args: {variant: 2M}}
    Interval(CFG(3), 0.3, 2.0)     a component inside a component
    AdamsBashforth.flow(3)         a class method that returns a component
"""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import isclass, ismethod, signature
from pathlib import Path
from typing import Any

from diffcore import caches, guidance, samplers, schedules
from diffcore.cli.arguments import wants_help
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import to_spec

__all__ = ["parse_with_run_defaults", "spell_calls"]

OPTIONS = {
    "sampler": "sampler",
    "grid": "grid",
    "sample_steps": "steps",
    "guidance": "guidance",
    "picture": "picture",
}
"""Setting of a run -> option of the command."""


CLASSES = {
    name: value
    for package in (schedules, samplers, guidance, caches)
    for name, value in vars(package).items()
    if isclass(value) and is_dataclass(value)
}
"""Name -> class of schedules, grids, samplers, guidance rules and caches."""


def parse_with_run_defaults(
    parser: ComponentParser,
    argv: Sequence[str],
    read_settings: Callable[[Path], Mapping[str, Any]],
) -> dict[str, Any]:
    """Parse the arguments of a command whose first argument is the folder of a run.

    Args:
        parser: parser with the positional argument `run` and those options of `OPTIONS` that the
            command has.
        argv: command-line words; components may be spelled as calls, such as CFG(2).
        read_settings: function that returns the settings of the run in a folder.

    Returns:
        The arguments by name, as components.

    Raises:
        ValueError: the folder does not come first, so that its settings are unknown, or it is not a
            run's.
    """
    if argv and not argv[0].startswith("-"):
        settings, known = read_settings(Path(argv[0])), parser.get_defaults()
        parser.set_defaults(
            {
                option: settings[name]
                for name, option in OPTIONS.items()
                if name in settings and option in known
            }
        )
    elif not wants_help(argv):
        raise ValueError(f"the run's folder comes first: {parser.usage}")
    return parser.instantiate(parser.parse_args(spell_calls(argv))).as_dict()


class _OtherText(Exception):
    """A text is not a call of a component."""


def spell_calls(argv: Sequence[str]) -> list[str]:
    """Replace constructor calls of components by plain data, which jsonargparse reads.

    Args:
        argv: command-line words, such as `--sampler=DPMSolverPP("2M")` or `CFG(2)`.

    Returns:
        The words; those that are not such a call are unchanged.

    Raises:
        ValueError: a class has no such argument, or refuses it.
    """
    return [_spell(word) for word in argv]


def _spell(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        node = ast.parse(value.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return word
    if not isinstance(node, ast.Call):
        return word
    try:
        return f"{option}{equals}{json.dumps(_read_call(node))}"
    except _OtherText:
        return word


def _read(node: ast.expr) -> Any:
    """The plain data of an argument: a literal, inf, or a call of a component."""
    if isinstance(node, ast.Call):
        return _read_call(node)
    text = ast.unparse(node)
    if text in ("inf", "-inf"):
        return to_spec(float(text))
    if isinstance(node, ast.Tuple | ast.List):
        return [_read(part) for part in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _OtherText from None


def _read_call(node: ast.Call) -> Any:
    name, _, method = ast.unparse(node.func).partition(".")
    cls: Any = CLASSES.get(name)
    function: Any = getattr(cls, method, None) if method else cls
    if function is None or method.startswith("_") or (method and not ismethod(function)):
        raise _OtherText
    positional = [_read(part) for part in node.args]
    named = {part.arg or "**": _read(part.value) for part in node.keywords}
    try:
        arguments = signature(function).bind(*positional, **named).arguments
        component = to_spec(function(**arguments)) if method else None
    except TypeError as error:
        raise ValueError(f"{ast.unparse(node)}: {error}") from error
    return component or {"class_path": name, "init_args": dict(arguments)}
