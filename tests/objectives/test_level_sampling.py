"""Resamplers: q is the density of Q(u), and every state gives the same expectation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from diffcore.core.process import Process, TimeConditioning
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.level_sampling import LearnedSchedule, Resampler, SecondMoment
from diffcore.objectives.objective import Objective
from diffcore.schedules import Cosine, Discrete

every_resampler = pytest.mark.parametrize("build", [SecondMoment, LearnedSchedule])


def fitted(resampler: Resampler, seed=0):
    """A state in which the bin probabilities differ by orders of magnitude."""
    z = torch.randn(
        resampler.bins, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    if isinstance(resampler, LearnedSchedule):
        return {"logits": 2 * z}
    return {"losses": (2 * z).exp()[:, None].expand(-1, resampler.history).clone()}


def uniform(count):
    """The midpoints of `count` equal cells of [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@every_resampler
def test_masses_are_a_distribution_above_its_floor(build):
    resampler = build(bins=7, floor=0.2)
    for state in (resampler.initial_state(), fitted(resampler)):
        masses = resampler.masses(state)
        assert masses.sum().item() == pytest.approx(1, abs=1e-14)
        assert (masses >= 0.2 / 7).all()
    torch.testing.assert_close(
        resampler.masses(resampler.initial_state()), torch.full((7,), 1 / 7, dtype=torch.float64)
    )
    assert resampler.masses(fitted(resampler)).max() > 0.3


@every_resampler
def test_the_density_is_the_slope_of_the_quantile_function(build):
    resampler = build(bins=10, floor=0.05)
    state, u, h = fitted(resampler), uniform(20_000), 1e-9
    t, ahead = resampler.times(state, u), resampler.times(state, u + h)
    inside = (t * 10).ceil() == (ahead * 10).ceil()
    slope = h / (ahead - t)[inside]
    torch.testing.assert_close(resampler.density(state, t, None)[inside], slope, rtol=1e-5, atol=0)
    assert inside.double().mean() > 0.999
    assert (t.diff() > 0).all()


@every_resampler
def test_drawn_times_have_the_density(build):
    resampler = build(bins=10, floor=0.05)
    state = fitted(resampler)
    u = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = resampler.times(state, u).numpy()
    ends = np.concatenate(([0], resampler.masses(state).cumsum(0).numpy()))
    assert stats.kstest(t, lambda x: np.interp(x, np.linspace(0, 1, 11), ends)).pvalue > 0.01
    assert stats.kstest(t, "uniform").pvalue < 1e-6


@every_resampler
def test_times_are_inside_the_interval_and_a_new_resampler_changes_none(build):
    resampler = build(bins=10, floor=0.05)
    u = torch.tensor([0.0, 2.0**-60, 0.1, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    for state in (resampler.initial_state(), fitted(resampler), fitted(resampler, 1)):
        t = resampler.times(state, u)
        assert ((t > 0) & (t < 1)).all()
        assert Cosine().logsnr(t).isfinite().all()
    torch.testing.assert_close(
        resampler.times(resampler.initial_state(), uniform(999)), uniform(999), rtol=0, atol=1e-15
    )
    assert torch.equal(
        resampler.density(resampler.initial_state(), uniform(999), None).round(decimals=12),
        torch.ones(999).double(),
    )


@every_resampler
@pytest.mark.parametrize(("bins", "steps"), [(10, 10), (10, 1000), (7, 50), (10, 45)])
def test_the_density_of_a_table_is_the_probability_of_its_cells(build, bins, steps):
    """T times the fraction of a fine grid of u in the cell, also for cells across bins."""
    resampler, schedule = build(bins=bins, floor=0.05), Discrete(steps=steps)
    state = fitted(resampler)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    density = resampler.density(state, t, steps)
    count = 400_000
    times = schedule.training_times(resampler.times(state, uniform(count)))
    share = (times * steps).round().long().bincount(minlength=steps + 1)[1:].double() / count
    torch.testing.assert_close(density / steps, share, rtol=0, atol=2.1 / count)
    assert density.mean().item() == pytest.approx(1, abs=1e-13)


@every_resampler
@pytest.mark.parametrize("schedule", [Cosine(), Discrete(steps=30)], ids=repr)
@pytest.mark.parametrize("levels", ["independent", "stratified"])
def test_the_expectation_is_the_same_for_any_state(build, schedule, levels):
    """The mean of L/q is ∫ L(t) dt, or the mean over a table, within 4 standard errors."""
    resampler = build(bins=12, floor=0.05)  # cells of a table of 30 straddle its bins
    state, process = (
        fitted(resampler),
        Process(schedule, shape=(1,), time=TimeConditioning(scale=30.0)),
    )
    objective = Objective(levels=levels, resampler=resampler)

    def loss(t):
        return 1 / (0.05 + t) + 3 * (t > 0.7)

    means = []
    for step in range(300):
        draw = objective.draw(process, SampleKey(2, step, torch.arange(32), 32), state=state)
        means.append((loss(draw.level.t.flatten()) * draw.importance).mean().item())
    entries = torch.arange(1, 31, dtype=torch.float64) / 30
    exact = math.log(1.05 / 0.05) + 0.9 if schedule.steps is None else loss(entries).mean().item()
    assert np.mean(means) == pytest.approx(exact, abs=4 * np.std(means) / math.sqrt(300))
    plain = Objective(levels=levels).draw(process, SampleKey(2, 0, torch.arange(32), 32))
    assert (plain.importance == 1).all()
    # Without a state the draw is that of an objective without a resampler.
    initial = objective.draw(process, SampleKey(2, 0, torch.arange(32), 32))
    assert torch.equal(initial.level.t, plain.level.t)
    assert (initial.importance == 1).all()


def test_a_level_of_a_table_on_the_edge_of_a_bin_belongs_to_the_lower_bin():
    """The cell is ((i-1)/T, i/T]: with as many bins as levels, each level has its own bin."""
    t = torch.arange(1, 9, dtype=torch.float64) / 8
    state = SecondMoment(bins=8, history=1).update(
        {"losses": torch.zeros(8, 1).double()}, t, 10 * t
    )
    assert torch.equal(state["losses"][:, 0], 10 * t)


class IDDPM:
    """The loss-second-moment sampler of improved-diffusion, written from section 4 of the paper."""

    def __init__(self, steps, history, uniform_prob):
        self.steps, self.history, self.uniform_prob = steps, history, uniform_prob
        self.losses = [[] for _ in range(steps)]

    def update(self, timesteps, losses):
        for step, loss in zip(timesteps, losses, strict=True):
            self.losses[step] = [*self.losses[step], loss][-self.history :]

    def weights(self):
        if any(len(known) < self.history for known in self.losses):
            return np.full(self.steps, 1 / self.steps)
        roots = np.array(
            [math.sqrt(sum(loss**2 for loss in known) / self.history) for known in self.losses]
        )
        return roots / roots.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.steps


@pytest.mark.parametrize("history", [1, 4])
def test_second_moment_agrees_with_improved_diffusion(history):
    """During and after warm-up, with batches that contain a bin many times, once or never."""
    reference = IDDPM(12, history, 0.01)
    resampler = SecondMoment(bins=12, history=history, floor=0.01)
    state, generator = resampler.initial_state(), torch.Generator().manual_seed(0)
    warm = []
    for _ in range(30):
        t = torch.rand(20, dtype=torch.float64, generator=generator)
        losses = torch.rand(20, dtype=torch.float64, generator=generator) / t
        before = {name: value.clone() for name, value in state.items()}
        after = resampler.update(state, t, losses)
        assert all(
            torch.equal(before[name].nan_to_num(-1), state[name].nan_to_num(-1)) for name in state
        )  # immutable
        state = after
        reference.update((t * 12).ceil().long().sub(1).tolist(), losses.tolist())
        np.testing.assert_allclose(resampler.masses(state).numpy(), reference.weights(), rtol=1e-12)
        warm.append(not np.allclose(reference.weights(), 1 / 12))
    assert not warm[0]
    assert warm[-1]


def root_second_moment(t):
    """√E[L²] of a loss that falls by two orders of magnitude."""
    return (-4.6 * t).exp() * math.sqrt(1.25)


def trained_state(resampler, updates, batch=512, seed=0):
    """The state after losses e^(-4.6 t) (1 + z/2) at stratified draws of the resampler."""
    state, generator = resampler.initial_state(), torch.Generator().manual_seed(seed)
    for _ in range(updates):
        u = (
            torch.rand(1, dtype=torch.float64, generator=generator) + torch.arange(batch) / batch
        ) % 1
        t = resampler.times(state, u)
        z = torch.randn(batch, dtype=torch.float64, generator=generator)
        state = resampler.update(state, t, root_second_moment(t) / math.sqrt(1.25) * (1 + z / 2))
    return state


RESAMPLERS = [
    SecondMoment(bins=20, history=30, floor=0.01),
    LearnedSchedule(bins=20, floor=0.01),
    LearnedSchedule(bins=100, floor=0.1),
]


@pytest.mark.parametrize("resampler", RESAMPLERS, ids=repr)
def test_the_fitted_density_is_the_root_of_the_second_moment(resampler):
    """π ∝ √E[L²] of each bin above the floor; ∫L² / ∫L²/q is 4.2 at best for this loss."""
    state = trained_state(resampler, 150)
    fine = uniform(20_000)
    moments = root_second_moment(fine).square().unflatten(0, (resampler.bins, -1)).mean(1).sqrt()
    best = resampler.floor / resampler.bins + (1 - resampler.floor) * moments / moments.sum()
    torch.testing.assert_close(resampler.masses(state), best, rtol=0.4, atol=0)
    assert (resampler.masses(state) / best - 1).square().mean().sqrt() < 0.2

    def variance(density):
        return (root_second_moment(fine) ** 2 / density).mean().item()

    reached = variance(resampler.density(state, fine, None))
    theory = variance(resampler.bins * best.repeat_interleave(20_000 // resampler.bins))
    assert reached == pytest.approx(theory, rel=0.01)
    assert variance(torch.ones_like(fine)) / reached > (2 if resampler.floor == 0.1 else 2.3)


def test_the_variance_of_the_draws_is_the_predicted_one():
    """Monte Carlo estimates of Var[L/q] for two states, against ∫ E[L²]/q - (∫ E[L])²."""
    resampler = LearnedSchedule(bins=20)
    state = trained_state(resampler, 150)
    generator = torch.Generator().manual_seed(5)
    u, z = (
        torch.rand(200_000, dtype=torch.float64, generator=generator),
        torch.randn(200_000, generator=generator),
    )
    mean = (1 - math.exp(-4.6)) / 4.6
    for current in (resampler.initial_state(), state):
        t = resampler.times(current, u)
        values = (
            root_second_moment(t)
            / math.sqrt(1.25)
            * (1 + z / 2)
            / resampler.density(current, t, None)
        )
        fine = uniform(20_000)
        second = (
            (root_second_moment(fine) ** 2 / resampler.density(current, fine, None)).mean().item()
        )
        assert values.mean().item() == pytest.approx(
            mean, abs=4 * values.std().item() / math.sqrt(2e5)
        )
        assert values.var().item() == pytest.approx(second - mean**2, rel=0.05)


def test_the_learned_schedule_descends_the_gradient_of_the_log_variance():
    """The expected update on a fine grid of u is -∂/∂θ ln ∫ L²/q by autograd, times min(K, 1/p)."""
    resampler = LearnedSchedule(bins=8, floor=0.1, rate=0.25)
    state = {"logits": torch.linspace(-1, 1.5, 8, dtype=torch.float64)}
    t = resampler.times(state, uniform(800_000))
    step = (resampler.update(state, t, 1 + t)["logits"] - state["logits"]) / 0.25
    theta = state["logits"].clone().requires_grad_()
    p = theta.softmax(0)
    pi = 0.1 / 8 + 0.9 * p
    squares = (1 + uniform(8000)).square().unflatten(0, (8, -1)).mean(1)
    (slope,) = torch.autograd.grad((squares / (8 * pi) / 8).sum().log(), theta)
    torch.testing.assert_close(
        step, -slope / 0.9 / p.detach().clamp(min=1 / 8), rtol=1e-3, atol=1e-4
    )


@every_resampler
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 3e38])
def test_losses_that_are_not_finite_are_ignored(build, broken):
    resampler = build(bins=5)
    state = trained_state(resampler, 30)
    t = uniform(50)
    losses = root_second_moment(t)
    losses[7] = broken
    masses = resampler.masses(resampler.update(state, t, losses))
    assert masses.isfinite().all()
    assert masses.sum().item() == pytest.approx(1)
    if not math.isfinite(broken):  # the finite losses have changed the state
        assert not torch.equal(masses, resampler.masses(state))
        rest = torch.arange(50) != 7
        torch.testing.assert_close(
            masses, resampler.masses(resampler.update(state, t[rest], losses[rest]))
        )


@every_resampler
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_batch_of_zero_or_nan_losses_keeps_the_density_uniform(build, value):
    resampler = build(bins=5)
    state = resampler.update(
        resampler.initial_state(), uniform(50), torch.full((50,), value, dtype=torch.float64)
    )
    torch.testing.assert_close(resampler.masses(state), torch.full((5,), 0.2, dtype=torch.float64))


@every_resampler
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 1}, "bins and update_interval are 1 and 10, expected at least 2 and 1"),
        (
            {"bins": 4, "update_interval": 0},
            "bins and update_interval are 4 and 0, expected at least 2 and 1",
        ),
        ({"floor": 0.0}, r"floor is 0.0, expected a share of uniform draws within \(0, 1\)"),
        ({"floor": 1.0}, "floor is 1.0"),
        ({"floor": math.nan}, "floor is nan"),
    ],
)
def test_settings_out_of_range_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_settings_of_one_resampler_out_of_range_are_refused():
    with pytest.raises(ValueError, match="history is 0, expected at least 1 loss"):
        SecondMoment(history=0)
    for rate in (0.0, -1.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"rate is {rate}, expected within \(0, 1\)"):
            LearnedSchedule(rate=rate)


@every_resampler
def test_a_table_with_fewer_levels_than_bins_is_refused(build):
    """A bin without a level would never have a loss, so SecondMoment would stay uniform."""
    process = Process(Discrete(steps=20), time=TimeConditioning(scale=20.0))
    objective = Objective(resampler=build(bins=21))
    with pytest.raises(
        ValueError, match=r"bins=21.* has more bins than Discrete.* has levels: use at most 20"
    ):
        objective.check(process)
    replace(objective, resampler=build(bins=20)).check(process)
    objective.check(Process(Cosine()))
