"""The optional fields of a process record, which versions before them did not write."""

from collections.abc import Mapping
from typing import Any

__all__ = ["OPTIONAL", "without_defaults"]

OPTIONAL: dict[str, Any] = {
    "conditions": {},
    "variance": "fixed",
    "estimate": "posterior_mean",
    "levels": "shared",
}
"""Fields that a record contains only if they differ from these defaults."""


def without_defaults(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the optional fields that have their defaults.

    Args:
        record: fields of a process as plain data.

    Returns:
        The record of versions that had no such fields.
    """
    return {
        name: value
        for name, value in record.items()
        if name not in OPTIONAL or value != OPTIONAL[name]
    }
