"""α-blending: order 1 is DDIM, order 2 the midpoint rule in a."""

import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Flow, Karras, Level, Trailing
from tests.helpers.oracles import SCALINGS, TO_NOISE, flow, mixture, process

NOISE = Noise(torch.arange(32), (2,), dtype=torch.float64)


@pytest.mark.parametrize(
    ("grid", "scaling"),
    [*((Karras(), scaling) for scaling in SCALINGS), (Trailing(), "vp"), (Trailing(), "flow")],
)
def test_order_1_is_ddim_bit_for_bit(grid, scaling):
    oracle = mixture(process(Cosine(scaling=scaling)))
    knots = grid.knots(oracle.process.schedule, 12)
    x = knots[0].sigma * NOISE.start()
    blended, ddim = (
        integrate(oracle, sampler, x, knots, NOISE) for sampler in (AlphaBlending(1), DDIM(0.0))
    )
    assert torch.equal(blended[0], ddim[0])
    assert blended[1] == ddim[1] == 12


def iadb(oracle, z, blends):
    """The midpoint rule for dz/da = ε - x_0 with x = (1-a) x_0 + a ε."""

    def velocity(z, a):
        logsnr = math.inf if a == 0 else -math.inf if a == 1 else 2 * math.log((1 - a) / a)
        x0, eps = oracle(z, Level(logsnr, a, 1 - a, a, Flow()))
        return eps - x0

    for a, b in zip(blends, blends[1:], strict=False):
        half = z + (b - a) / 2 * velocity(z, a)
        z = z + (b - a) * velocity(half, (a + b) / 2)
    return z


@pytest.mark.parametrize("name", TO_NOISE)
def test_order_2_is_the_midpoint_rule_in_a_from_pure_noise_to_data(name):
    """x = (α+σ) z with α+σ = 1 at both ends, so x and z are equal there in every scaling."""
    oracle = mixture(process(TO_NOISE[name]))
    knots = Trailing().knots(oracle.process.schedule, 20)
    assert (knots[0].alpha, knots[-1].sigma) == (0, 0)
    x, evaluations = integrate(oracle, AlphaBlending(2), NOISE.start(), knots, NOISE)
    expected = iadb(
        oracle, NOISE.start(), [knot.sigma / (knot.alpha + knot.sigma) for knot in knots]
    )
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    assert evaluations == 40


@pytest.mark.parametrize("schedule", (Flow(), Flow(scaling="vp")), ids=str)
def test_order_2_holds_from_alpha_0_to_sigma_0_on_uniform_a(schedule):
    oracle = mixture(process(schedule))
    exact = flow(oracle, NOISE.start(), schedule.level(1.0), schedule.level(0.0))
    errors = []
    for n in (128, 256):
        x, _ = integrate(
            oracle, AlphaBlending(2), NOISE.start(), Trailing().knots(schedule, n), NOISE
        )
        errors.append((x - exact).norm(dim=1).median())
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


def test_order_2_also_integrates_towards_noise():
    oracle = mixture(process(Flow()))
    schedule = oracle.process.schedule
    down = [schedule.at(-5 + i / 20) for i in range(201)]
    x = oracle.sample(torch.arange(32))
    exact = flow(oracle, x, down[-1], down[0])
    result, _ = integrate(oracle, AlphaBlending(2), x, tuple(reversed(down)), NOISE)
    assert (result - exact).norm(dim=1).median() < 2e-5  # 6e-6; the first-order step errs by 7e-3


@pytest.mark.parametrize("order", (0, 3))
def test_other_orders_are_rejected(order):
    with pytest.raises(ValueError, match="order is"):
        AlphaBlending(order)
