"""Exact distributions in the plane, by name."""

import pytest
import torch

from diffcore.core.oracle import PLANE_NAMES, plane_distribution
from diffcore.evaluation.energy_distance import energy_distance
from diffcore.schedules import Flow
from diffcore.training.data.generated import TwoMoons


@pytest.mark.parametrize("name", PLANE_NAMES)
def test_a_process_states_the_standard_deviation_of_its_distribution(name):
    oracle = plane_distribution(name, Flow())
    assert oracle.process.schedule == Flow()
    x0 = oracle.sample(torch.arange(20_000))
    deviation = float(x0.var(0, correction=0).mean().sqrt())
    assert deviation == pytest.approx(oracle.process.sigma_data, rel=0.015)


@pytest.mark.parametrize("name", PLANE_NAMES)
def test_a_distribution_has_two_classes_of_other_points(name):
    oracle = plane_distribution(name)
    seeds = torch.arange(200)
    first, second = (oracle.sample(seeds, torch.full((200,), label)) for label in (0, 1))
    level = oracle.process.schedule.at(7.0)
    condition = torch.zeros(200, dtype=torch.int64)
    own = oracle.log_density(level.alpha * first, level, condition)
    other = oracle.log_density(level.alpha * second, level, condition)
    assert float(own.min()) > float(other.median())


def test_the_moons_are_those_of_the_data_set():
    data = TwoMoons(2000)
    oracle = plane_distribution("moons")
    for label in (0, 1):
        x0 = data.x0[data.labels == label]
        own = oracle.sample(torch.arange(1000), torch.full((1000,), label)).float()
        again = TwoMoons(2000, seed=1)
        between_data = energy_distance(x0, again.x0[again.labels == label])
        assert energy_distance(own, x0) < between_data + 0.003
    assert energy_distance(own, data.x0[data.labels == 0]) > 0.1


def test_an_unknown_distribution_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'noons', expected one of moons, mixture, ring, points"):
        plane_distribution("noons")
