"""The tables of claims."""

import re
from pathlib import Path

import pytest
from experiments.claims.report import REPORTS, TRAINING_PAIRS, format_speed_ups, speed_up
from experiments.claims.studies import STUDIES
from experiments.study import read_measurements

DOCS = Path(__file__).parents[4] / "docs"


def test_half_the_steps_are_twice_the_speed():
    base = {"100": (400.0, 0), "200": (100.0, 0), "400": (25.0, 0)}
    twice = {"50": (400.0, 0), "100": (100.0, 0), "200": (25.0, 0)}
    assert speed_up(twice, base, 200) == pytest.approx(2)
    assert speed_up(base, base, 200) == pytest.approx(1)
    between = {"100": (200.0, 0), "200": (50.0, 0)}
    assert speed_up(between, base, 200) == pytest.approx(2**0.5)


def test_a_distance_beyond_a_curve_counts_as_its_end():
    base = {"200": (100.0, 0)}
    assert speed_up({"50": (90.0, 0), "100": (80.0, 0)}, base, 200) == pytest.approx(4)
    assert speed_up({"50": (190.0, 0), "100": (180.0, 0)}, base, 200) == pytest.approx(2)


def test_speed_ups_are_paired_by_seed():
    rows = [
        {"arm": arm, "seed": seed, "distances": {"100": (first, 0), "200": (second, 0)}}
        for seed, arm, first, second in (
            (0, "a", 50.0, 25.0),
            (0, "b", 100.0, 50.0),
            (1, "a", 100.0, 50.0),
            (1, "b", 100.0, 50.0),
        )
    ]
    assert "| a | b | 1.50 ± 0.50 |" in format_speed_ups(rows, [("a", "b")], 200)


@pytest.mark.parametrize("path", sorted(DOCS.glob("experiments/claims-*.jsonl")), ids=str)
def test_the_stored_measurements_of_each_study_have_a_table(path):
    rows = read_measurements(path)
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert REPORTS[path.stem.removeprefix("claims-")](rows).startswith("| ")


def numbers(text):
    """All `mean ± half range` of a text, with the digits after their points."""
    found = re.findall(r"(\d+(?:\.\d+)?)\s±\s(\d+(?:\.\d+)?)", text)
    return {tuple((float(n), len(n.partition(".")[2])) for n in pair) for pair in found}


def test_every_mean_of_the_page_is_that_of_the_measurements_or_of_another_page():
    pages = [f"experiments/{name}.md" for name in ("training", "guidance", "zero-terminal-snr")]
    texts = [(DOCS / page).read_text() for page in pages]
    for name, report in REPORTS.items():
        texts.append(report(read_measurements(DOCS / f"experiments/claims-{name}.jsonl")))
    training = read_measurements(DOCS / "experiments/training.jsonl")
    texts.append(format_speed_ups(training, TRAINING_PAIRS, 400))
    known = numbers("\n".join(texts))

    def is_rounded(cell, other):
        return all(
            digits <= places and abs(n - m) <= 0.5001 * 10**-digits
            for (n, digits), (m, places) in zip(cell, other, strict=True)
        )

    page = numbers((DOCS / "claims.md").read_text())
    assert len(page) > 150
    assert [cell for cell in page if not any(is_rounded(cell, it) for it in known)] == []


def test_every_study_has_a_report():
    assert set(STUDIES) == set(REPORTS)
