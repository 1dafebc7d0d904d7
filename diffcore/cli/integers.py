"""Lists of integers on the command line, such as the labels and the seeds of `diffcore sample`."""

import re
from collections.abc import Iterable
from typing import Any

from jsonargparse.typing import register_type

__all__ = ["MAXIMUM_COUNT", "IntegerList"]

MAXIMUM_COUNT = 1_000_000
"""Largest number of samples of one command."""


class IntegerList(tuple[int, ...]):
    """Integers written as "0-9,12": single ones and inclusive ranges, in the given order."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: Any) -> "IntegerList":
        """Read integers from text, from one integer, or from a list of both.

        Args:
            value: text such as "0-9,12", an integer, or an iterable of them.

        Returns:
            The integers, in the given order, with repetitions.

        Raises:
            ValueError: the text is not a list of integers and ranges, a range runs backwards, or
                there are too many integers.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            return cls((value,))
        if isinstance(value, Iterable) and not isinstance(value, str):
            return cls(number for item in value for number in cls.parse(item))
        parts = [part.strip() for part in str(value).split(",")]
        return cls(number for part in parts for number in _parse_range(part))

    def __str__(self) -> str:
        return ",".join(str(number) for number in self)


register_type(IntegerList, serializer=str, deserializer=IntegerList.parse)


def _parse_range(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number or a range such as 0-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the range {text} runs backwards")
    if last - first >= MAXIMUM_COUNT:
        raise ValueError(
            f"the range {text} has {last - first + 1:,} integers, expected at most "
            f"{MAXIMUM_COUNT:,}: draw them in several calls"
        )
    return range(first, last + 1)
