"""The study of training: what it measures is appended, continued, and averaged as it says."""

import pytest
import torch
from experiments.training import (
    ARMS,
    KNOTS,
    averaged,
    measure,
    rows,
    stepped,
    study,
    table,
    trainer,
)

from diffcore.core.process import Process
from diffcore.objectives.objective import Objective


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_can_be_sampled_over_the_common_knots(name):
    arm = ARMS[name]
    process = Process(arm.schedule, arm.prediction, shape=(1, 8, 8), classes=10, dropout=0.1)
    arm.objective.check(process)
    knots = KNOTS.knots(arm.schedule, 20)
    assert (knots[0].logsnr, knots[-2].logsnr) == (-9, 7)


def test_an_arm_is_measured_after_each_number_of_steps():
    found = measure(ARMS["cosine, v, Min-SNR"], "stratified", 0, (2, 1), per_label=1)
    assert list(found) == [1, 2]
    assert all(distance > 0 for pair in found.values() for distance in pair)
    assert found == measure(ARMS["cosine, v, Min-SNR"], "stratified", 0, (1, 2), per_label=1)


def test_a_study_continues_what_its_file_holds(tmp_path, monkeypatch):
    asked = []

    def told(arm, levels, seed, points):
        asked.append((arm.objective, levels, seed))
        return {100: (1.0, 2.0)}

    monkeypatch.setattr("experiments.training.measure", told)
    out, arms = tmp_path / "study.jsonl", {"one": ARMS["cosine, v"]}
    assert len(list(study(out, [0], arms))) == 2
    assert len(list(study(out, [0, 1], arms))) == 2
    assert [(levels, seed) for _, levels, seed in asked] == [
        ("independent", 0),
        ("stratified", 0),
        ("independent", 1),
        ("stratified", 1),
    ]
    assert isinstance(asked[0][0], Objective)
    assert rows(out)[0] == {
        "arm": "one",
        "levels": "independent",
        "seed": 0,
        "distances": {"100": [1.0, 2.0]},
    }


def test_the_table_holds_means_over_seeds_and_half_ranges():
    measured = [
        {
            "arm": "a",
            "levels": "stratified",
            "seed": seed,
            "distances": {"100": [value, 0.0], "800": [1.0, 4.0]},
        }
        for seed, value in enumerate((10.0, 20.0, 12.0))
    ]
    assert table(measured, 0).splitlines()[2] == "| a | stratified | 14.0 ± 5.0 | 1.0 ± 0.0 |"
    assert table(measured, 1).splitlines()[2] == "| a | stratified | 0.0 ± 0.0 | 4.0 ± 0.0 |"


def test_the_network_of_a_run_has_its_averaged_weights(tmp_path):
    settings = trainer(ARMS["cosine, v, Min-SNR"], "stratified", 0, tmp_path, 2)
    found = averaged(settings).network.state_dict()
    *_, last = stepped(settings)
    assert all(torch.equal(found[name], value) for name, value in last.average.shadow.items())
    assert not any(
        torch.equal(found[name], value) for name, value in last.network.named_parameters()
    )
