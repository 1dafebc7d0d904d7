"""No network is evaluated at a cleaner level than those that it was trained on."""

import math
from itertools import pairwise

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import Process, TimeConditioning
from diffcore.guidance import CFG, Interval
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdaptiveRungeKutta,
    AlphaBlending,
    DPMSolverPP,
    Heun,
    Restart,
)
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, sample
from diffcore.sampling.loop import integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import (
    Cosine,
    Discrete,
    Explicit,
    Laplace,
    LogLinear,
    Rho,
    Truncated,
    UniformBlend,
    Within,
)
from tests.helpers.oracles import ExactNetwork, flow, mixture, process
from tests.helpers.products import sampled
from tests.helpers.schedules import SCHEDULES, STABLE_DIFFUSION, UNIFORM_GRIDS
from tests.samplers.test_orders import ADAPTIVE, ORDERS
from tests.samplers.test_weak_orders import WEAK

TRUNCATED = Truncated(Laplace(scaling="flow"), -6.0, 6.0)
FINITE = [TRUNCATED, LogLinear.ve(), Rho(), STABLE_DIFFUSION, Discrete("cosine", 50)]
NOISE = Noise(torch.arange(8), (2,), dtype=torch.float64)


def limit(schedule):
    """λ at t = 0, or at the first entry of a table."""
    return schedule.logsnr(1 / schedule.steps if schedule.steps else 0.0)


@pytest.mark.parametrize(
    ("schedule", "grid"), sampled(SCHEDULES, [*UNIFORM_GRIDS, DEFAULT_GRID], count=60), ids=repr
)
def test_the_knots_before_the_last_are_levels_of_training(schedule, grid):
    if grid.knots(Cosine(), 2)[0].logsnr < schedule.logsnr(1.0):
        grid = Within(grid, low=schedule.logsnr(1.0))
    for steps in (1, 2, 10, 40):
        knots = grid.knots(schedule, steps)
        assert len(knots) == steps + 1
        assert max(knot.logsnr for knot in knots[:-1]) <= limit(schedule) + 1e-6
        assert knots[-1].logsnr == math.inf


def test_a_grid_that_is_cut_is_uniform_down_to_the_cleanest_level():
    grid = UniformBlend()
    knots = grid.knots(TRUNCATED, 40)
    assert knots[-2].logsnr == TRUNCATED.logsnr(0.0) == 6.0
    gaps = [a.blend - b.blend for a, b in pairwise(knots[:-1])]
    assert gaps == pytest.approx([(knots[0].blend - knots[-2].blend) / 39] * 39, rel=1e-9)
    few = grid.knots(TRUNCATED, 10)  # its last noisy knot is at a = a_0 / 10, above the limit
    assert [knot.blend for knot in few] == pytest.approx(
        [few[0].blend * (10 - i) / 10 for i in range(11)], rel=1e-9
    )
    ended = Within(grid, high=8.0).knots(TRUNCATED, 200)
    assert [knot.logsnr for knot in ended[-2:]] == [6.0, 8.0]


@pytest.mark.parametrize("schedule", FINITE, ids=repr)
@pytest.mark.parametrize("steps", [25, 50])
def test_an_exact_network_conditioned_on_the_index_follows_the_exact_flow(schedule, steps):
    """The index of each level that is evaluated determines the level."""
    record = process(schedule, prediction="v_prediction", time=TimeConditioning("index"))
    network = ExactNetwork(mixture(record), record)
    arguments = {"steps": steps, "seeds": range(8), "dtype": torch.float64}
    result = sample(Denoiser(network, record), **arguments)
    times = [time[0].item() for _, time, _ in network.calls]
    assert len(set(times)) == len(times) == steps
    assert min(times) >= (0 if schedule.steps else -1)
    exact = sample(mixture(record), **arguments)
    torch.testing.assert_close(result.x, exact.x, rtol=0, atol=2e-4)  # float32 times


def test_samples_of_a_truncated_schedule_converge_to_the_flow_to_its_cleanest_level():
    record = process(TRUNCATED)
    oracle, start = mixture(record), TRUNCATED.level(1.0)
    x = NOISE.first_sample(start, record.sigma_data)
    cleanest = TRUNCATED.at(6.0)
    expected = oracle(flow(oracle, x, start, cleanest), cleanest).x0
    errors = []
    for steps in (25, 100, 400):
        knots = DEFAULT_GRID.knots(TRUNCATED, steps)
        result, _ = integrate(oracle, AdamsBashforth.deis(2, "t"), x, knots, NOISE)
        errors.append((result - expected).norm(dim=1).median())
    assert errors[0] > 4 * errors[1] > 30 * errors[2]


@pytest.mark.parametrize(
    ("sampler", "schedule"), sampled([*ORDERS, *ADAPTIVE, *WEAK], FINITE[::3], count=70), ids=repr
)
def test_no_sampler_evaluates_a_cleaner_level(sampler, schedule):
    levels = []
    knots = DEFAULT_GRID.knots(schedule, 30)
    x, _ = integrate(
        mixture(process(schedule)),
        sampler,
        NOISE.first_sample(knots[0], 0.5),
        knots,
        NOISE,
        callback=lambda _, state, __: levels.append(state.level.logsnr),
    )
    assert x.isfinite().all()
    assert max(levels) <= limit(schedule) + 1e-6


@pytest.mark.parametrize(
    "sampler",
    [AlphaBlending(2), Heun(), DPMSolverPP("2S"), AdaptiveRungeKutta(), *ADAPTIVE],
    ids=lambda sampler: str(sampler),
)
def test_the_step_from_the_cleanest_level_to_the_clean_knot_is_x_0(sampler):
    oracle, cleanest = mixture(process(TRUNCATED)), TRUNCATED.cleanest
    for end in (TRUNCATED.at(math.inf), TRUNCATED.at(8.0)):
        expected = oracle(NOISE.start(), cleanest).at(end)
        x, evaluations = integrate(oracle, sampler, NOISE.start(), (cleanest, end), NOISE)
        assert torch.equal(x, expected)
        assert evaluations == 1


def test_cleaner_levels_that_are_given_are_refused_and_the_last_may_be_cleaner():
    with pytest.raises(
        ValueError, match=r"Explicit.*knot at λ = 7, but the cleanest.*λ = 6: only the last knot"
    ):
        Explicit((-2.0, 7.0, math.inf)).knots(TRUNCATED, 2)
    with pytest.raises(ValueError, match="knot at λ = 8, but the cleanest"):
        Within(UniformBlend(), low=8.0).knots(TRUNCATED, 3)
    record = Process(TRUNCATED, shape=(2,))
    with pytest.raises(ValueError, match=r"is at λ = 7, but the network was .* to 6: eval"):
        record.check_level(TRUNCATED.at(7.0))
    with pytest.raises(ValueError, match=r"is at λ = -7, but the network .* from λ = -6 to 6"):
        record.check_level(TRUNCATED.at(-7.0))
    knots = Explicit((-2.0, 6.0, 7.0)).knots(TRUNCATED, 2)
    assert sample(
        mixture(process(TRUNCATED)), DDIM(), Explicit((-2.0, 6.0, 7.0)), 2, seeds=[1]
    ).knots == (knots)


@pytest.mark.parametrize("place", (0, 1))
def test_each_knot_that_is_evaluated_is_checked_also_without_a_grid(place):
    logsnrs = [-2.0, 3.0, math.inf]
    logsnrs[place] = 7.0
    knots = tuple(TRUNCATED.at(logsnr) for logsnr in logsnrs)
    oracle, name = mixture(process(TRUNCATED)), ("the first knot", "knot 1")[place]
    with pytest.raises(ValueError, match=f"{name} is at λ = 7, but the network was trained"):
        integrate(oracle, DDIM(), NOISE.start(), knots, NOISE)


def test_guidance_and_restart_add_no_cleaner_levels():
    knots = DEFAULT_GRID.knots(TRUNCATED, 25)
    assert insert_levels(knots, [9.0]) == knots
    rule = Interval(CFG(2.0), math.exp(-4.5), 3.0)
    result = sample(
        mixture(process(TRUNCATED)), DEFAULT_SAMPLER, seeds=[1], condition=[1], guidance=rule
    )
    assert result.knots[-2].logsnr == 6.0
    with pytest.raises(ValueError, match=r"ends beyond the cleanest level of training, 0\.0497871"):
        Restart(intervals=((math.exp(-3.5), 1.0, 2, 1),)).segments(knots)
    Restart(intervals=((0.05, 1.0, 2, 1),)).segments(knots)  # the remedy
