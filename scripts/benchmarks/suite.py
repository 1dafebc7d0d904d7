"""All benchmarks in one command: their measurements, docs/benchmarks.md, and regressions.

Each benchmark runs in a process of its own. Its table replaces the text between

    <!-- benchmark NAME -->
    <!-- end -->

in the pages. Its measurements replace docs/benchmarks/NAME.json, which are the baseline of the next
run: a ratio whose interval lies above that of the baseline is a regression.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pictures.themes import draw_themes

from benchmarks.table import markdown_table

__all__ = ["PARTS", "Part", "draw_ratios", "find_regressions", "replace_block", "run_suite"]

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
LONGEST_START = 5.0
"""Largest number of seconds until the first step on the large folder of images."""
TOLERANCE = {"error": 1.05, "memory": 1.05, "start": 1.2}
"""Largest ratio of a number without interval to that of the baseline."""


@dataclass(frozen=True)
class Part:
    """A benchmark of the suite.

    Args:
        name: name of its block and of its file of measurements.
        words: words of the command line.
        quick: options that shorten it, to try the suite.
    """

    name: str
    words: str
    quick: str = ""


PARTS = (
    Part("start-up", "start_up --pairs 8", "--pairs 6"),
    Part("steps", "steps --threads 1 --pairs 100", "--pairs 30"),
    Part("overhead", "overhead --pairs 30 --samples 16", "--samples 1"),
    Part("training", "training --pairs 60 --threads 1", "--pairs 30"),
    Part("training-two-threads", "training --pairs 60 --threads 2", "--pairs 30"),
    Part("peers", "peers --pairs 40 --threads 1", "--pairs 30"),
    Part("pipeline", "pipeline --threads 1 --pairs 60", "--pairs 30"),
    Part("guidance", "guidance --samples 16 --pairs 30 --threads 1", "--samples 1"),
    Part("folder", "folder --repeats 3", "--repeats 1 --images 2000"),
    Part("memory", "memory --networks tiny large --threads 1", "--networks tiny"),
    Part("serve", "serve --threads 1 --requests 24", "--requests 4"),
    Part("accuracy", "accuracy --starts 128 --threads 1 --peers", "--starts 4 --counts 5 10"),
)


def run_suite(
    parts: Sequence[Part], docs: Path, quick: bool = False, report: Callable[[str], None] = print
) -> list[str]:
    """Run benchmarks, and rewrite the pages, the pictures and the stored measurements.

    Args:
        parts: benchmarks to run.
        docs: folder of the pages.
        quick: whether to shorten the benchmarks; their numbers are not those of the pages then.
        report: receives lines about the progress.

    Returns:
        The regressions, one line each.

    Raises:
        ValueError: benchmarks failed; the others are written.
    """
    begin, stored = time.monotonic(), docs / "benchmarks"
    stored.mkdir(exist_ok=True)
    regressions: list[str] = []
    failed: list[str] = []
    for part in parts:
        report(f"{time.monotonic() - begin:6.0f} s: {part.words}")
        try:
            facts = _measure(part, docs, quick)
        except subprocess.CalledProcessError as error:
            failed.append(part.name)  # the others are measured all the same
            report(f"{part.name} ended with status {error.returncode}")
            continue
        path = stored / f"{part.name}.json"
        if path.is_file():
            regressions += find_regressions(json.loads(path.read_text("utf-8")), facts)
        for block, text in facts.pop("blocks").items():
            _replace_in_pages(docs, block if block != "table" else part.name, text)
        facts.pop("rows", None)  # thousands, of which the page and the baseline need few
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    measured = {path.stem: json.loads(path.read_text("utf-8")) for path in stored.glob("*.json")}
    _replace_in_pages(docs, "summary", _summary(measured, regressions, failed))
    draw_themes(partial(draw_ratios, measured), docs / "pictures" / "ratios.png")
    report(f"{time.monotonic() - begin:6.0f} s: end")
    if failed:
        raise ValueError(f"these benchmarks failed, and their tables are old: {', '.join(failed)}")
    return regressions


def _measure(part: Part, docs: Path, quick: bool) -> dict[str, Any]:
    """Run a benchmark, and read its facts."""
    words = part.words.split() + (part.quick.split() if quick else [])
    if part.name == "accuracy":
        words += ["--picture", str(docs / "pictures" / "accuracy.png")]
    with TemporaryDirectory() as folder:
        out = Path(folder, "facts.json")
        command = [sys.executable, str(SCRIPT), *words, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        facts: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return facts


def find_regressions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Compare measurements with the baseline.

    Args:
        before: stored facts of a benchmark.
        after: new facts of the same benchmark.

    Returns:
        A line for each ratio whose interval lies above the stored one, and for each other number
        beyond `TOLERANCE`.
    """
    found = []
    known = {each["name"]: each for each in before.get("comparisons", ())}
    for each in after.get("comparisons", ()):
        old = known.get(each["name"])
        if old is not None and each["interval"][0] > old["interval"][1]:
            low, high = each["interval"]
            found.append(
                f"{each['name']}: ratio {each['ratio']:.3f} ({low:.3f} to {high:.3f}), stored "
                f"{old['ratio']:.3f} (up to {old['interval'][1]:.3f})"
            )
    old_numbers = dict(_numbers(before))
    for (kind, name), value in _numbers(after):
        stored = old_numbers.get((kind, name))
        if stored is not None and value > TOLERANCE[kind] * stored:
            found.append(f"{name}: {value:.4g}, stored {stored:.4g}")
    return found


def _numbers(facts: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """The numbers without interval that are compared with the baseline, by kind and name."""
    for oracle, count, error in facts.get("default_errors", ()):
        yield ("error", f"error of the default, {oracle}, {count} evaluations"), error
    for side, size in facts.get("memory", {}).items():
        yield ("memory", f"memory in MiB, {side}"), size
    starts = facts.get("starts", ())
    if len(starts) == 2:
        ratio = starts[1]["seconds"] / starts[0]["seconds"]
        yield ("start", "start on the large folder over the small one"), ratio


def replace_block(text: str, name: str, block: str) -> str:
    """Replace the text between the markers of a block.

    Args:
        text: text of a page.
        name: name of the block.
        block: new text.

    Returns:
        The text of the page.

    Raises:
        ValueError: the page does not have the markers exactly once.
    """
    pattern = rf"(<!-- benchmark {re.escape(name)} -->\n).*?(<!-- end -->)"
    new, count = re.subn(
        pattern, lambda found: f"{found[1]}{block.strip()}\n{found[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"the page has {count} blocks <!-- benchmark {name} -->, expected one")
    return new


def _replace_in_pages(docs: Path, name: str, block: str) -> None:
    """Replace a block in the page that has it."""
    pages = [docs / "benchmarks.md", docs / "experiments" / "accuracy.md"]
    marker = f"<!-- benchmark {name} -->"
    page = next((page for page in pages if marker in page.read_text("utf-8")), pages[0])
    page.write_text(replace_block(page.read_text("utf-8"), name, block), encoding="utf-8")


def _summary(
    measured: Mapping[str, Mapping[str, Any]],
    regressions: Sequence[str],
    failed: Sequence[str] = (),
) -> str:
    """Which targets are missed, what is worse than the baseline, and what was not measured."""
    rows = [
        [name, each["name"], f"{each['ratio']:.3f}", f"{each['bound']:g}", each["verdict"]]
        for name, facts in sorted(measured.items())
        for each in facts.get("comparisons", ())
        if each["verdict"] not in ("met", "")
    ]
    missed = (
        markdown_table(["benchmark", "work", "ratio", "at most", "target"], rows) if rows else ""
    )
    lines = [missed or "Every target of a ratio is met."]
    starts = measured.get("folder", {}).get("starts", ())
    if len(starts) == 2:
        is_met = starts[1]["seconds"] <= LONGEST_START
        lines += ["", f"The start of training on a large folder: {'met' if is_met else 'missed'}."]
    lines += ["", "Worse than the stored measurements: " + ("" if regressions else "nothing.")]
    lines += [f"- {line}" for line in regressions]
    if failed:
        lines += ["", f"Failed in this run, so that the tables are older: {', '.join(failed)}."]
    return "\n".join(lines)


def draw_ratios(measured: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw all ratios with their intervals and targets.

    Args:
        measured: facts by the name of the benchmark.
        path: image to write.
    """
    from diffcore.report.figures import create_figure, save_figure

    rows = [
        (f"{each['name']} ({name})", each)
        for name, facts in sorted(measured.items())
        for each in facts.get("comparisons", ())
        if each["bound"] is None or each["bound"] < 5  # others would hide the differences
    ]
    if not rows:
        return
    from matplotlib import rcParams

    ink = rcParams["text.color"]
    figure, (axis,) = create_figure(1, width=9, height=1 + 0.28 * len(rows))
    for place, (_, each) in enumerate(reversed(rows)):
        low, high = each["interval"]
        axis.plot([low, high], [place, place], color=ink, linewidth=2)
        axis.plot([each["ratio"]], [place], "o", color=ink, markersize=4)
        if each["bound"] is not None:
            bound = {"color": ink, "markerfacecolor": "none", "markersize": 9}
            axis.plot([each["bound"]], [place], "D", zorder=1, **bound)
    axis.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
    axis.axvline(1, color="0.6", zorder=0)
    axis.set_ylim(-0.8, len(rows) - 0.2)
    axis.set(xlabel="time of diffcore over the other side; a hollow diamond is the target")
    save_figure(figure, path, dpi=110)
