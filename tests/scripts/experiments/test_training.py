"""The study of training: its measurements are appended, continued and averaged."""

import json
from pathlib import Path

import pytest
from experiments.study import read_measurements
from experiments.training import KNOTS, VARIANTS, format_table, measure, run_study

from diffcore.core.process import Process
from diffcore.objectives.objective import Objective


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_be_sampled_over_the_common_knots(name):
    variant = VARIANTS[name]
    process = Process(
        variant.schedule, variant.prediction, shape=(1, 8, 8), classes=10, dropout=0.1
    )
    variant.objective.check(process)
    knots = KNOTS.knots(variant.schedule, 20)
    assert (knots[0].logsnr, knots[-2].logsnr) == (-9, 7)


@pytest.mark.slow
def test_a_variant_is_measured_after_each_number_of_steps():
    found = measure(VARIANTS["cosine, v, Min-SNR"], "stratified", 0, (2, 1), per_label=1)
    assert list(found) == [1, 2]
    assert all(distance > 0 for pair in found.values() for distance in pair)
    assert found == measure(VARIANTS["cosine, v, Min-SNR"], "stratified", 0, (1, 2), per_label=1)


def test_a_study_continues_what_its_file_holds(tmp_path, monkeypatch):
    calls = []

    def measured(variant, levels, seed, points):
        calls.append((variant.objective, levels, seed))
        return {100: (1.0, 2.0)}

    monkeypatch.setattr("experiments.training.measure", measured)
    out, variants = tmp_path / "study.jsonl", {"one": VARIANTS["cosine, v"]}
    assert len(list(run_study(out, [0], variants))) == 2
    assert len(list(run_study(out, [0, 1], variants))) == 2
    assert [(levels, seed) for _, levels, seed in calls] == [
        ("independent", 0),
        ("stratified", 0),
        ("independent", 1),
        ("stratified", 1),
    ]
    assert isinstance(calls[0][0], Objective)
    assert read_measurements(out)[0] == {
        "arm": "one",
        "levels": "independent",
        "seed": 0,
        "distances": {"100": [1.0, 2.0]},
    }


def test_the_table_holds_means_over_seeds_and_half_ranges():
    measurements = [
        {
            "arm": "a",
            "levels": "stratified",
            "seed": seed,
            "distances": {"100": [value, 0.0], "800": [1.0, 4.0]},
        }
        for seed, value in enumerate((10.0, 20.0, 12.0))
    ]
    assert (
        format_table(measurements, 0).splitlines()[2]
        == "| a | stratified | 14.0 ± 5.0 | 1.0 ± 0.0 |"
    )
    assert (
        format_table(measurements, 1).splitlines()[2]
        == "| a | stratified | 0.0 ± 0.0 | 4.0 ± 0.0 |"
    )


def test_the_stored_rows_are_those_of_the_variants():
    path = Path(__file__).parents[3] / "docs" / "experiments" / "training.jsonl"
    stored = {json.loads(line)["arm"] for line in path.read_text().splitlines()}
    assert stored == set(VARIANTS)
