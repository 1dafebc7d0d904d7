"""Findings: one plain sentence each, with a mark and the numbers behind it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffcore.io.files import write_file

__all__ = ["Finding", "Mark", "format_finding", "has_wrong", "summarize", "write_findings"]

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


def write_findings(folder: str | Path, findings: Iterable[Finding]) -> None:
    """Write findings.json into a folder, which is created.

    Args:
        folder: folder to write to.
        findings: the findings.
    """
    folder = Path(folder)
    content = [
        {"name": f.name, "mark": f.mark, "text": f.text, "values": dict(f.values)} for f in findings
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    write_file(folder / "findings.json", f"{text}\n".encode())
