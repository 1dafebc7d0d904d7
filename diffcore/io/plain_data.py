"""JSON and YAML files, which are read as plain data of bounded size; an error names the file."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["hash_data", "read_json", "read_text", "read_yaml", "without_defaults"]

MAXIMUM_BYTES = 1 << 24
"""Largest file of JSON; the data in memory take up to twenty times as much."""
MAXIMUM_YAML_BYTES = 1 << 20
"""Largest file of YAML, which is parsed about a hundred times more slowly than JSON."""
MAXIMUM_DEPTH = 64
MAXIMUM_ENTRIES = 100_000
"""Largest number of entries of a YAML file in which every alias is written out."""


def hash_data(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys.

    Args:
        data: data of JSON or YAML.

    Returns:
        The hash, 64 hexadecimal digits.
    """
    content = json.dumps(data, sort_keys=True, default=str)  # YAML has dates
    return hashlib.sha256(content.encode()).hexdigest()


def without_defaults(record: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the entries that equal their defaults.

    Args:
        record: entries by name.
        defaults: default of each entry that may be left out.

    Returns:
        The record of versions that had no such entries.
    """
    return {
        name: value
        for name, value in record.items()
        if name not in defaults or value != defaults[name]
    }


def read_text(path: str | Path, maximum: int = MAXIMUM_BYTES) -> str:
    """Read a file of UTF-8 text.

    Args:
        path: file to read.
        maximum: largest number of bytes.

    Returns:
        The text, without a byte-order mark.

    Raises:
        ValueError: the file is missing, is larger, or is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size > maximum:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, expected at most {maximum:,}: remove what "
            "diffcore did not write"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: file to read.

    Returns:
        The entries of the object.

    Raises:
        ValueError: the file is missing, too large, not JSON in UTF-8, nested too deeply, or holds
            something else than an object.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
        _count_entries(data, _items)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return _as_table(path, data, "an object such as {...}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the table in a YAML file. No tag builds an object.

    Args:
        path: file to read.

    Returns:
        The entries of the table.

    Raises:
        ValueError: the file is missing, too large, not YAML in UTF-8, nested too deeply, has too
            many entries when its aliases are written out, or holds something else than a table.
    """
    text = read_text(path, MAXIMUM_YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and _count_entries(node, _nodes) > MAXIMUM_ENTRIES:
            raise ValueError(f"its aliases stand for more than {MAXIMUM_ENTRIES:,} entries")
        data = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return _as_table(path, data, "a table of settings such as `steps: 800`")


def _as_table(path: str | Path, data: Any, expected: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        found = "null" if data is None else f"a {type(data).__name__}"
        raise ValueError(f"{path} holds {found}, expected {expected}")
    return data


def _items(value: Any) -> Iterable[Any]:
    """The parts of plain data."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _nodes(node: Any) -> Iterable[Any]:
    """The parts of a node of YAML."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _count_entries(
    root: Any,
    parts: Callable[[Any], Iterable[Any]],
    depth: int = 0,
    counts: dict[int, int] | None = None,
) -> int:
    """The number of entries, where one that is used several times counts as often.

    Raises:
        ValueError: the entries are nested too deeply, or without end.
    """
    counts = {} if counts is None else counts
    if depth > MAXIMUM_DEPTH:
        raise ValueError(f"it is nested more than {MAXIMUM_DEPTH} deep")
    if id(root) not in counts:
        counts[id(root)] = 1 + sum(
            _count_entries(part, parts, depth + 1, counts) for part in parts(root)
        )
    return counts[id(root)]
