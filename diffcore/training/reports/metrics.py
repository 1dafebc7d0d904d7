"""The files of reports: one line of JSON for each report, which a resumed run writes again."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcore.io.files import WriteError, write_file
from diffcore.io.plain_data import read_text

__all__ = ["Metrics"]


class Metrics:
    """The file metrics.jsonl: one line of JSON for each report.

    It holds nothing that depends on the speed of the machine, so that a resumed run writes the
    same bytes.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def reports(self) -> list[dict[str, Any]]:
        """The reports in the file, without a line that a crash cut short.

        Returns:
            One dictionary for each line.
        """
        return [report for report in map(_parsed, self._lines()) if report is not None]

    def complete_reports(
        self,
        numbers: Sequence[str],
        lists: Sequence[str] = (),
        optional: Sequence[str] = (),
        optional_lists: Sequence[str] = (),
    ) -> list[Any]:
        """The reports in the file, each with all entries that its reader needs.

        Args:
            numbers: entries that are numbers or null.
            lists: entries that are lists of them.
            optional: entries that are numbers or null, or missing.
            optional_lists: entries that are lists of them, or missing.

        Returns:
            One dictionary for each line that is a report.

        Raises:
            ValueError: An entry is missing or of another type; the message has file and line.
        """
        reports = [(number, _parsed(line)) for number, line in enumerate(self._lines(), 1)]
        for number, report in reports:
            if report is None:
                continue
            single = ("step", *numbers, *(name for name in optional if name in report))
            several = (*lists, *(name for name in optional_lists if name in report))
            wrong = [name for name in single if not _is_number(report.get(name, ""))]
            wrong += [name for name in several if not _is_list_of_numbers(report.get(name))]
            if wrong or report["step"] is None:
                raise ValueError(
                    f"{self.path}: line {number} has no {wrong[0] if wrong else 'step'}, or one "
                    "that is no number: restore or remove the line"
                )
        return [report for _, report in reports if report is not None]

    def rewind(self, step: int) -> list[int]:
        """Remove the reports after `step`.

        Args:
            step: last step whose report is kept.

        Returns:
            Numbers of the lines that were removed because they are no reports, without the last
            line, which a crash may have cut short.
        """
        if not self.path.is_file():
            return []
        reports = [_parsed(line) for line in self._lines()]
        kept = [report for report in reports if report and (report["step"] or 0) <= step]
        write_file(self.path, "".join(f"{json.dumps(report)}\n" for report in kept).encode())
        return [number for number, report in enumerate(reports[:-1], 1) if report is None]

    def write(self, values: Mapping[str, float | list[float]]) -> None:
        """Append a report; a value that is not finite becomes null, because JSON has no NaN.

        Args:
            values: numbers and lists of numbers by their name.

        Raises:
            WriteError: The file cannot be written.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise WriteError(
                f"{self.path} cannot be written ({error.strerror}): its lines and the checkpoints "
                "are kept; make room on the disk, then continue with --resume true"
            ) from None

    def _lines(self) -> list[str]:
        return read_text(self.path, 1 << 30).splitlines() if self.path.is_file() else []


def _plain(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    """Whether a value is a number or null."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_report = isinstance(report, dict) and isinstance(report.get("step", ""), int | None)
    return report if is_report else None
