"""Command-line words before jsonargparse reads them: spelling of names, and repeated options."""

import json
import re
from collections.abc import Sequence

__all__ = ["extract_option", "join_option", "normalize_options", "wants_help"]


def normalize_options(argv: Sequence[str]) -> list[str]:
    """Spell option names with underscores, as jsonargparse does: --per-label becomes --per_label.

    Args:
        argv: command-line words.

    Returns:
        The words; values keep their dashes.
    """
    return [
        re.sub(r"^--[\w.-]+", lambda name: "--" + name.group()[2:].replace("-", "_"), word)
        for word in argv
    ]


def extract_option(
    argv: Sequence[str], name: str, expected: str, *, may_be_empty: bool = False
) -> tuple[list[str], list[str]]:
    """Take every `--NAME VALUE` and `--NAME=VALUE` out; the values are not read as YAML.

    Args:
        argv: command-line words.
        name: name of the option, without dashes.
        expected: what the option expects, for the error message.
        may_be_empty: whether an empty text is a value.

    Returns:
        The values in their order, and the other words.

    Raises:
        ValueError: an option has no value.
    """
    values, others = [], []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option != f"--{name}":
            others.append(word)
            continue
        following = value if equals else next(words, None)
        if following is None or not (following or may_be_empty):
            raise ValueError(f"--{name} expects {expected}")
        values.append(following)
    return values, others


def join_option(
    argv: Sequence[str], name: str, expected: str, *, may_be_empty: bool = False
) -> list[str]:
    """Replace every `--NAME VALUE` by one option with the list of the values.

    Args:
        argv: command-line words.
        name: name of the option, without dashes.
        expected: what the option expects, for the error message.
        may_be_empty: whether an empty text is a value.

    Returns:
        The words, with the list last.

    Raises:
        ValueError: an option has no value.
    """
    values, words = extract_option(argv, name, expected, may_be_empty=may_be_empty)
    if values:
        words.append(f"--{name}={json.dumps(values, ensure_ascii=False)}")
    return words


def wants_help(argv: Sequence[str]) -> bool:
    """Whether command-line words request help, of the command or of a class."""
    return any(word in ("-h", "--help") or re.match(r"--[\w.]+\.help\b", word) for word in argv)
