"""Findings: one plain sentence each, with a mark and the numbers behind it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "Mark", "format_finding", "has_wrong", "summarize"]

Mark = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        name: name of the check, such as "data range".
        mark: ok; warning, for what may be meant; wrong, for what spoils the run.
        text: one sentence that states what was measured, and the remedy if the mark is not ok.
        values: the numbers behind the sentence, as plain data.
    """

    name: str
    mark: Mark
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


def format_finding(finding: Finding) -> str:
    """The line of a finding on the terminal.

    Example:
        >>> format_finding(Finding("data range", "ok", "x_0 is within [-1, 1]."))
        'ok       data range: x_0 is within [-1, 1].'
    """
    return f"{finding.mark:<8} {finding.name}: {finding.text}"


def has_wrong(findings: Iterable[Finding]) -> bool:
    """Whether a finding has the mark `wrong`."""
    return any(finding.mark == "wrong" for finding in findings)


def summarize(findings: Iterable[Finding]) -> str:
    """The number of findings by mark, such as "14 ok, 1 warning, 0 wrong".

    Example:
        >>> summarize([Finding("a", "ok", ""), Finding("b", "wrong", "")])
        '1 ok, 0 warnings, 1 wrong'
    """
    marks = [finding.mark for finding in findings]
    warnings = marks.count("warning")
    plural = "" if warnings == 1 else "s"
    return f"{marks.count('ok')} ok, {warnings} warning{plural}, {marks.count('wrong')} wrong"
