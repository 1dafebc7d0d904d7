import math

import diffusers
import pytest
import torch

from diffcore.core.prediction import Prediction
from diffcore.core.transition import fresh_noise_share, log_variance_bounds, posterior_mean
from diffcore.schedules import Cosine, Discrete, Flow, Rescaled


@pytest.mark.parametrize("scaling", ["vp", "ve", "flow"])
def test_the_posterior_is_the_product_of_the_two_gaussians_that_x_s_has_from_x_0_and_to_x_t(
    scaling,
):
    schedule = Rescaled(Cosine(), scaling)
    t, s, x0, eps = schedule.level(0.7), schedule.level(0.4), 0.3, -1.1
    x_t = t.alpha * x0 + t.sigma * eps
    scale = t.alpha / s.alpha  # x_t = scale x_s + noise of this variance:
    variance = t.sigma**2 - (scale * s.sigma) ** 2
    precision = 1 / s.sigma**2 + scale**2 / variance
    mean = (s.alpha * x0 / s.sigma**2 + scale * x_t / variance) / precision
    pair = Prediction(*torch.tensor([[x0], [eps]], dtype=torch.float64))
    assert posterior_mean(pair, t, s).item() == pytest.approx(mean, rel=1e-12)
    assert log_variance_bounds(t, s)[0].exp().item() == pytest.approx(1 / precision, rel=1e-12)


@pytest.mark.parametrize("steps", [1000, 10])
def test_the_bounds_are_the_two_variances_of_diffusers(steps):
    scheduler = diffusers.DDPMScheduler(1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule = Discrete("linear", 1000)
    for index in (999, 499 if steps == 10 else 2):
        t = schedule.level((index + 1) / 1000)
        s = schedule.level((index + 1) / 1000 - 1 / steps)
        lower, upper = (bound.exp().item() for bound in log_variance_bounds(t, s))
        assert lower == pytest.approx(scheduler._get_variance(index).item(), rel=1e-3)
        large = scheduler._get_variance(index, variance_type="fixed_large").item()
        assert upper == pytest.approx(large, rel=1e-3)


def test_the_bounds_of_a_step_from_pure_noise_are_finite_and_those_of_a_clean_step_have_no_lower():
    noise, middle, clean = (Flow().level(t) for t in (1.0, 0.5, 0.0))
    lower, upper = log_variance_bounds(noise, middle)
    assert lower.item() == pytest.approx(2 * math.log(0.5))
    assert upper.item() == pytest.approx(math.log(0.5))  # n_s² = 1/4 + 1/4
    lower, upper = log_variance_bounds(middle, clean)
    assert lower.item() == -math.inf
    assert upper.item() == pytest.approx(math.log(0.5))


def test_levels_of_each_sample_have_the_bounds_and_the_mean_of_single_levels():
    schedule = Cosine()
    times = torch.tensor([0.9, 0.3]).view(2, 1)
    t, s = schedule.level(times), schedule.level(times - 0.2)
    pair = Prediction(torch.ones(2, 3), torch.full((2, 3), 2.0))
    lower, upper = log_variance_bounds(t, s)
    for i, time in enumerate(times.flatten().tolist()):
        single = schedule.level(time), schedule.level(time - 0.2)
        assert lower[i].item() == pytest.approx(log_variance_bounds(*single)[0].item(), rel=1e-6)
        assert upper[i].item() == pytest.approx(log_variance_bounds(*single)[1].item(), rel=1e-6)
        one = Prediction(pair.x0[i], pair.eps[i])
        assert torch.allclose(
            posterior_mean(pair, t.to(pair.x0), s.to(pair.x0))[i], posterior_mean(one, *single)
        )


def test_a_transition_to_a_noisier_level_is_refused():
    t, s = Cosine().level(0.3), Cosine().level(0.5)
    with pytest.raises(ValueError, match="knots that fall in noise"):
        fresh_noise_share(t, s)
