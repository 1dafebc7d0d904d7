"""The study of few-step networks: its measurements and its table."""

from dataclasses import replace

import pytest
import torch
from experiments.students import flow_maps
from experiments.students.flow_maps import METHODS, format_table
from experiments.students.mixtures import create_problem, create_process, train

from diffcore.core.denoiser import Denoiser
from diffcore.distillation import OracleTeacher
from diffcore.distillation.flow_map import FlowMap
from diffcore.networks import Perceptron, TwoTimes
from diffcore.objectives.objective import Objective


@pytest.fixture(scope="module")
def problem():
    return create_problem(2)


def test_the_samples_of_a_problem_are_those_of_its_mixture(problem):
    mean = problem.oracle.means.mean(0)
    torch.testing.assert_close(problem.data.double().mean(0), mean, atol=0.05, rtol=0)
    assert not torch.equal(problem.data[: len(problem.truth)], problem.truth)
    assert flow_maps.distances(problem.oracle, problem, (40,))[0] < 0.01


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "mean flow")) for n in METHODS]
)
def test_a_student_of_each_method_is_trained_and_changes(name, problem):
    process = create_process(2)
    denoiser = train(problem, process, Objective(), 0, 1, None)
    start = {key: value.clone() for key, value in denoiser.network.state_dict().items()}
    objective = METHODS[name].objective(OracleTeacher(denoiser), 2)
    own = replace(process, estimate=METHODS[name].estimate)
    student = train(problem, own, objective, 0, 2, start)
    inner = getattr(student.network, "network", student.network).state_dict()
    assert any(not torch.equal(inner[key], start[key]) for key in start)


def test_the_exact_mean_velocity_has_no_error(problem):
    exact = FlowMap(problem.oracle, "mean_velocity", 32)
    assert flow_maps.velocity_error(exact, problem) < 1e-9
    process = replace(create_process(2), estimate="mean_velocity")
    network = TwoTimes(lambda: Perceptron((2,), 8, 1))
    assert flow_maps.velocity_error(Denoiser(network, process), problem) == pytest.approx(
        1, abs=0.1
    )


def test_the_table_has_the_spread_of_the_seeds():
    rows = [
        {"size": 2, "method": "a", "from": "data", "distance": {"1": d}, "error of U": 2 * d}
        for d in (0.001, 0.003)
    ]
    cells = [cell.strip() for cell in format_table(rows, 2).splitlines()[-1].strip("|").split("|")]
    assert cells == ["a", "data", "2.00 ± 1.00", "", "", "", "0.004 ± 0.002"]
