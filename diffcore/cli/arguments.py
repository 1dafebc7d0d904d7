"""What the sub-commands' arguments share."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from jsonargparse.typing import register_type

from diffcore.io.parser import ComponentParser, trust

DEFAULTS = ("sampler", "grid", "sample_steps", "guidance")
"""What a run or a pipeline has of its own, and a command may replace."""


class Ints(tuple[int, ...]):
    """Integers written as "0-9,12": single ones and inclusive ranges, in the order given."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: Any) -> "Ints":
        """From text, an integer, or a list of them."""
        if isinstance(value, int) and not isinstance(value, bool):
            return cls((value,))
        if isinstance(value, Iterable) and not isinstance(value, str):
            return cls(number for item in value for number in cls.parse(item))
        parts = [part.strip() for part in str(value).split(",")]
        return cls(number for part in parts for number in _range(part))

    def __str__(self) -> str:
        return ",".join(str(number) for number in self)


register_type(Ints, serializer=str, deserializer=Ints.parse)


def normalized(argv: Sequence[str]) -> list[str]:
    """The arguments with --per-label spelt --per_label, as the parser knows it."""
    return [
        re.sub(r"^--[\w.-]+", lambda name: "--" + name.group()[2:].replace("-", "_"), word)
        for word in argv
    ]


def gathered(argv: Sequence[str], name: str) -> list[str]:
    """The arguments with each --NAME TEXT in one list: a text is not read as YAML, and may be repeated."""
    rest, texts = [], []
    words = iter(argv)
    for word in words:
        option, equals, text = word.partition("=")
        if option == f"--{name}":
            texts.append(text if equals else next(words, None))
        else:
            rest.append(word)
    if None in texts:
        raise ValueError(f"--{name} expects a text")
    return [*rest, f"--{name}={json.dumps(texts)}"] if texts else rest


def trusted(argv: Sequence[str]) -> list[str]:
    """The arguments without --trust MODULE, which lets the others name classes of that module."""
    rest, modules = [], []
    words = iter(argv)
    for word in words:
        if word == "--trust" or word.startswith("--trust="):
            modules.append(word.partition("=")[2] or next(words, ""))
        else:
            rest.append(word)
    if not all(modules):
        raise ValueError(
            "--trust expects the name of a module whose classes the configuration may name"
        )
    trust(*modules)
    return rest


def default_to(parser: ComponentParser, own: dict[str, Any], argv: Sequence[str]) -> None:
    """Make the run's own sampler, grid, steps and guidance the defaults, each unless another class is named in its place."""
    chosen = {
        name: own[name] for name in DEFAULTS if name in own and not _replaced(name, own[name], argv)
    }
    if "sample_steps" in chosen:
        chosen["steps"] = chosen.pop("sample_steps")
    parser.set_defaults(chosen)


def _replaced(name: str, own: Any, argv: Sequence[str]) -> bool:
    """Whether the command line names another class, which would else take over the options it shares with the run's."""
    words = [word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")]
    words += [word for option, word in pairwise(argv) if option == f"--{name}"]
    kind = own.get("class_path", "") if isinstance(own, dict) else str(own)
    return any(word.rpartition(".")[2] != kind.rpartition(".")[2] for word in words)


def _range(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number or a range such as 0-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the range {text} runs backwards")
    return range(first, last + 1)
