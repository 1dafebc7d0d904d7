"""The solved flow and the distance of samplers to it, on exact denoisers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import DenoiserWrapper
from diffcore.core.prediction import Prediction
from diffcore.evaluation.flow.comparison_table import (
    View,
    draw_samplers,
    format_cases,
    name_sampler,
)
from diffcore.evaluation.flow.exact_flow import rms_distance, solve_flow
from diffcore.evaluation.flow.sampler_comparison import SamplerComparison, steps_within
from diffcore.guidance import APG, CFG, CFGPlusPlus, Interval
from diffcore.samplers import (
    DDIM,
    DDPM,
    AdamsMoulton,
    AdaptiveRungeKutta,
    AlphaBlending,
    DPMSolverPP,
    Heun,
    UniPC,
)
from diffcore.schedules import Karras, Trailing, UniformBlend
from tests.helpers.oracles import flow, gaussian, mixture

SEEDS, LABELS = range(8), [0, 1] * 4
COVARIANCE = torch.diag(torch.tensor([0.36, 0.04], dtype=torch.float64))


def compare(samplers, counts=(8,), guidances=(CFG(1.0),), denoiser=None, **options):
    options = {"condition": LABELS, "repeats": 1, "flow_steps": 40} | options
    denoiser = denoiser or mixture()
    return SamplerComparison(denoiser, SEEDS, samplers, counts, guidances, **options).run()


def test_the_solved_flow_is_that_of_a_gaussian_and_its_error_is_not_understated():
    """Along the flow x - α m is proportional to √(α² s² + σ²); from pure noise, x_0 = m + s z."""
    oracle = gaussian((0.4, -0.3), COVARIANCE)
    oracle.process = replace(oracle.process, classes=0, dropout=0.0)
    from diffcore.core.noise import Noise

    z = Noise(torch.tensor(list(SEEDS)), (2,), dtype=torch.float64).start()
    exact = torch.tensor([0.4, -0.3]) + z * torch.tensor([0.6, 0.2], dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        solution = solve_flow(oracle, SEEDS, None, CFG(1.0), steps)
        actual = rms_distance(solution.x, exact).median().item()
        assert actual < solution.error < 20 * actual
        errors.append(actual)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)  # of order 2
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)


def test_the_distance_is_the_root_mean_square_over_the_elements_of_each_sample():
    x = torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]])
    assert rms_distance(x, torch.ones(2, 1, 2)).tolist() == pytest.approx([6.5**0.5, 0])


def test_the_flow_of_guidance_starts_and_ends_where_the_sampler_does():
    oracle, rule = mixture(), CFG(2.0)

    def guided(x, level):
        label = torch.tensor(LABELS)
        cond, null = oracle(x, level, label), oracle(x, level, torch.full_like(label, 2))
        return Prediction(*(2 * c - n for c, n in zip(cond, null, strict=True)))

    first, last = (oracle.process.schedule.at(logsnr) for logsnr in (-4.0, 5.0))
    solution = solve_flow(oracle, SEEDS, LABELS, rule, 200, (first, last))
    from diffcore.core.noise import Noise

    start = Noise(torch.tensor(list(SEEDS)), (2,), dtype=torch.float64).first_sample(
        first, oracle.process.sigma_data
    )
    exact = flow(guided, start, first, last)
    assert rms_distance(solution.x, exact).median() < min(1e-3, solution.error)


def test_the_distance_falls_with_the_order_and_with_the_evaluations():
    """Half the step divides the distance by 2 to the power of the order."""
    samplers = {DDIM(): 2, AdamsMoulton(1): 4, AdamsMoulton(2): 8}
    cases = compare(list(samplers), counts=(16, 32), flow_steps=400)
    found = {(case.sampler, case.count): case.distance for case in cases}
    for sampler, ratio in samplers.items():
        coarse, fine = (found[sampler, count].median for count in (16, 32))
        assert coarse / fine == pytest.approx(ratio, rel=0.25)
    for distance in found.values():
        assert distance.low <= distance.median <= distance.high
        assert distance.is_resolved


def test_a_sampler_of_two_stages_takes_half_as_many_steps():
    process = mixture().process
    rule = CFG(1.0)
    for sampler in (Heun(), AlphaBlending(2), DDIM(), DPMSolverPP("2S")):
        for count in (1, 4, 9):
            steps = steps_within(sampler, process, Trailing(), rule, count)
            counts = [sampler.evaluations(Trailing().knots(process.schedule, n)) for n in (1, 2, 9)]
            assert steps == max(
                (
                    n
                    for n in range(1, count + 1)
                    if sampler.evaluations(Trailing().knots(process.schedule, n)) <= count
                ),
                default=0,
            ), counts
    assert steps_within(AlphaBlending(2), process, Trailing(), rule, 1) == 0
    assert steps_within(AlphaBlending(2), process, Trailing(), rule, 9) == 4
    cases = compare([AlphaBlending(2)], counts=(1, 9), flow_steps=4)
    assert cases[0].reason == "one step takes more than 1 evaluations"
    assert cases[0].x is None
    assert name_sampler(cases) == "AlphaBlending(2) (–, 4 steps)"
    assert cases[1].evaluations == 8


def test_the_knots_that_guidance_adds_are_counted():
    rule = Interval(CFG(2.0), low=0.3, high=2.0)
    (case,) = compare([DDIM()], counts=(8,), guidances=[rule], flow_steps=4)
    assert case.steps == 6
    assert 8 < case.evaluations < 16
    assert case.distance is not None


@pytest.mark.parametrize(
    ("sampler", "rule", "reason", "is_drawn"),
    [
        (DDPM(), CFG(1.0), "stochastic", True),
        (DDIM(0.5), CFG(1.0), "stochastic", True),
        (Heun(churn=4.0), CFG(1.0), "stochastic", True),
        (DDIM(), APG(2.0), "defines no flow", True),
        (DDIM(), CFGPlusPlus(0.6), "defines no flow", True),
        (UniPC(2), CFGPlusPlus(0.6), "use a sampler of first-order steps", False),
    ],
    ids=str,
)
def test_what_has_no_flow_has_no_distance_and_a_reason(sampler, rule, reason, is_drawn):
    samplers = [sampler] if is_drawn else [sampler, DDIM()]
    case = compare(samplers, guidances=[rule], flow_steps=4)[0]
    assert reason in case.reason
    assert case.distance is None
    assert (case.x is not None) == is_drawn
    assert (case.seconds_per_sample is not None) == is_drawn
    text = "\n".join(format_cases([case]))
    assert reason in text
    assert "≤" not in text


def test_no_distance_below_the_error_of_the_flow_is_printed():
    (case,) = compare([UniPC(2)], counts=(40,), flow_steps=4)
    assert not case.distance.is_resolved
    row = next(line for line in format_cases([case]) if line.startswith("UniPC(2)"))
    assert row.split() == ["UniPC(2)", "≤", f"{case.flow.error:.1g}"]


def test_the_flow_of_each_first_level_is_solved_once():
    """Karras begins at a finite level; its first noise is not that of the default grid."""
    grid = Karras(0.01, 20.0)
    first, second = compare([UniPC(2)], counts=(12, 16), grid=grid, flow_steps=100)
    assert first.flow is second.flow
    assert first.distance.median < 0.05
    other = compare([UniPC(2)], counts=(12,), grid=UniformBlend(), flow_steps=4)[0]
    assert rms_distance(first.flow.x, other.flow.x).median() > 0.01


def test_the_flow_that_samplers_share_is_decoded_once():
    decoded = []

    def decode(x):
        decoded.append(x)
        return x

    cases = compare([DDIM(), Heun()], counts=(4,), flow_steps=4)
    draw_samplers(cases, View(mixture().process, decode=decode))
    assert len(decoded) == 3
    assert sum(torch.equal(x, cases[0].flow.x.float()) for x in decoded) == 1


class Broken(DenoiserWrapper):
    """NaN for the first sample."""

    def __call__(self, x, level, condition=None):
        x0, eps = self.inner(x, level, condition)
        return Prediction(torch.cat((x0[:1] * math.nan, x0[1:])), eps)


def test_samples_that_are_not_finite_are_counted():
    (case,) = compare([DDIM()], counts=(2,), denoiser=Broken(mixture()), flow_steps=4)
    assert case.distance is None
    assert case.reason == "1 of 8 samples are not finite"


def test_few_samples_have_a_distance_without_interval():
    comparison = SamplerComparison(
        mixture(), range(5), [DDIM()], [3], [CFG(1.0)], [0] * 5, repeats=1, flow_steps=4
    )
    (case,) = comparison.run()
    assert case.distance.low is case.distance.high is None
    assert "[" not in format_cases([case])[4]


def test_two_comparisons_are_equal_and_passes_are_timed():
    first, second = (compare([DDIM(), DDPM()], repeats=n, flow_steps=4) for n in (1, 3))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x, other.x)
        assert one.distance == other.distance
        assert (len(one.seconds), len(other.seconds)) == (1, 3)
        assert other.seconds_per_sample == sorted(other.seconds)[1] / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samplers": [AdaptiveRungeKutta()]}, "chooses its number of evaluations itself"),
        ({"samplers": []}, "expected one of each"),
        ({"samplers": [DDIM()], "counts": [0]}, "expected at least 1"),
        ({"samplers": [DDIM()], "repeats": 0}, "expected at least 1"),
        ({"samplers": [DDIM()], "flow_steps": 1}, "expected at least 2"),
        ({"samplers": [DDIM()], "condition": [7] * 8}, "out of range"),
        ({"samplers": [AlphaBlending(2)], "counts": [1]}, "no sampler can be run: one step"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare(**options)
    with pytest.raises(ValueError, match="defines no flow"):
        solve_flow(mixture(), SEEDS, LABELS, APG(2.0))


def test_the_network_is_left_in_its_mode():
    class Zero(nn.Module):
        def forward(self, x, time):
            return torch.zeros_like(x)

    from diffcore.core.denoiser import Denoiser
    from diffcore.core.process import Process

    denoiser = Denoiser(Zero(), Process(shape=(2,))).train()
    compare([DDIM()], counts=(2,), denoiser=denoiser, condition=None, flow_steps=4)
    assert denoiser.network.training
