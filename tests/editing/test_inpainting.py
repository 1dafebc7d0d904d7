"""RePaint keeps the known pixels, jumps as in the paper, and approaches the conditional
distribution.
"""

import copy
import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.editing.inpainting import RePaint
from diffcore.samplers import DDIM, AlphaBlending, PredictorCorrector, Restart
from diffcore.samplers.base import raise_noise
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Karras, Trailing, UniformLogSNR, Within
from tests.helpers.oracles import SCALINGS, covariance, gaussian, mixture, process
from tests.helpers.products import sampled
from tests.samplers.test_orders import ORDERS

INNER = [*ORDERS, DDIM(0.5), DDIM(1.0)]
ORACLE = mixture()
IMAGE, MASK = torch.tensor([0.7, 9.0], dtype=torch.float64), torch.tensor([True, False])
SEEDS = range(64)
NOISE = Noise(torch.arange(64), (2,), dtype=torch.float64)


def paint(inner=DDIM(1.0), jump=2, resamplings=3):
    return RePaint(inner, IMAGE, MASK, jump, resamplings)


def published(n, jump, resamplings):
    """Indices of the knots that the authors' code visits.

    Their t is n-1 at the first knot, 0 at the last noisy knot and -1 at the clean level.
    """
    left = dict.fromkeys(range(0, n - jump, jump), resamplings - 1)
    t, visited = n, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            visited.extend(range(t + 1, t + jump + 1))
            t += jump
    return [n - 1 - t for t in (*visited, -1)]


@pytest.mark.parametrize("n", (1, 2, 5, 10, 11, 23))
@pytest.mark.parametrize(("jump", "resamplings"), ((1, 1), (1, 4), (3, 2), (10, 10), (4, 3)))
def test_the_visited_knots_are_those_of_the_paper(n, jump, resamplings):
    """A jump to a noisier knot is one step, with the distribution of `jump` single steps."""
    knots = UniformLogSNR(-5.0, 5.0).knots(Cosine(), n)
    sampler = paint(DDIM(), jump, resamplings)
    evaluated = []
    integrate(
        ORACLE,
        sampler,
        NOISE.start(),
        knots,
        NOISE,
        callback=lambda *call: evaluated.append(call[1].level),
    )
    visited = published(n, jump, resamplings)
    evaluations = [
        i for i, after in zip(visited, visited[1:], strict=False) if after > i
    ]  # where the network is evaluated
    assert [knots.index(level) for level in evaluated] == evaluations
    assert sampler.evaluations(knots) == len(evaluations)


@pytest.mark.parametrize(
    ("inner", "grid"), sampled(INNER, (Trailing(), Karras(0.05, 20.0)), count=27), ids=str
)
def test_known_pixels_are_exact_in_the_result_of_any_inner_sampler(inner, grid):
    result = sample(ORACLE, paint(inner), grid, 8, seeds=SEEDS, batch_size=32, dtype=torch.float64)
    assert (result.x[:, 0] == IMAGE[0]).all()
    assert result.x[:, 1].isfinite().all()
    assert result.x[:, 1].std() > 0.1
    assert result.evaluations == paint(inner).evaluations(result.knots)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_known_pixels_have_fresh_noise_at_the_level_of_each_knot(scaling):
    """With 400 samples, means and correlations are below 5/√400.

    The knots are close, so that a jump back keeps much of the noise.
    """
    oracle, states = mixture(process(Cosine(scaling=scaling))), []
    noise = Noise(torch.arange(400), (2,), dtype=torch.float64)
    knots = Explicit((-1.0, -0.6, -0.2, 0.2, 0.6, math.inf)).knots(oracle.process.schedule, 5)
    integrate(
        oracle,
        paint(),
        noise.start(),
        knots,
        noise,
        callback=lambda _, state, __: states.append(state),
    )
    visits = [
        state for state in states if state.level != knots[0]
    ]  # the first knot has its initial noise
    z = torch.stack(
        [(state.x[:, 0] - state.level.alpha * IMAGE[0]) / state.level.sigma for state in visits]
    )
    assert len(visits) > 6
    assert (z.mean(1).abs() < 0.25).all()
    assert z.std(1) == pytest.approx(torch.ones(len(visits)), abs=0.2)
    fresh = torch.cat(
        (z, noise.start()[:, 0][None], torch.stack([noise.step(i)[:, 0] for i in range(8)]))
    )
    correlated = (fresh.corrcoef() - torch.eye(len(fresh))).abs() > 0.25
    above = [(i, j) for i, j in correlated.triu().nonzero().tolist()]
    assert all(
        visits[i].level.logsnr > visits[j].level.logsnr for i, j in above
    )  # only a jump back keeps noise


@pytest.mark.parametrize(("low", "high"), ((3.0, 0.5), (0.5, -4.0), (2.0, -math.inf)))
@pytest.mark.parametrize("scaling", SCALINGS[::2])
def test_a_jump_has_exactly_the_marginal_of_the_noisier_level(low, high, scaling):
    t, s = (Cosine(scaling=scaling).at(logsnr) for logsnr in (low, high))
    unit, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    image, old, new = (
        raise_noise(x, t, s, z)
        for x, z in ((t.alpha * unit, zero), (t.sigma * unit, zero), (zero, unit))
    )
    assert image == pytest.approx(s.alpha, abs=1e-12)
    assert (old**2 + new**2).sqrt() == pytest.approx(s.sigma, rel=1e-12)


def test_with_resampling_the_unknown_part_has_its_conditional_distribution():
    """On a Gaussian the conditional mean is 0.204 and its standard deviation is 0.380."""
    cov = covariance(1.0, 0.3, 0.7)
    oracle = gaussian([0.5, -0.3], cov)
    mean = -0.3 + cov[1, 0] / cov[0, 0] * (1.2 - 0.5)
    errors = []
    for resamplings in (1, 10):
        sampler = RePaint(
            DDIM(1.0), torch.tensor([1.2, 0.0], dtype=torch.float64), MASK, 1, resamplings
        )
        x = sample(
            oracle, sampler, UniformLogSNR(-8.0, 8.0), 50, seeds=range(1500), batch_size=1500
        ).x
        errors.append((x[:, 1].mean() - mean).abs())
        assert x[:, 1].std() == pytest.approx(
            (cov[1, 1] - cov[1, 0] ** 2 / cov[0, 0]).sqrt().item(), rel=0.15
        )
    assert errors[0] > 0.13
    assert errors[1] < 0.05


def test_a_state_can_be_kept_copied_and_continued_bit_for_bit():
    sampler, knots = paint(), Trailing().knots(Cosine(), 6)
    state = sampler.start(NOISE.start(), knots, NOISE)
    kept = [state]
    while not state.done:
        state = sampler.advance(state, ORACLE(state.x, state.level), NOISE)
        kept.append(state)
    for begin in (copy.deepcopy(kept[4]), kept[9]):
        state = begin
        while not state.done:
            state = sampler.advance(state, ORACLE(state.x, state.level), NOISE)
        assert torch.equal(state.x, kept[-1].x)
    assert [state.step for state in kept] == list(range(len(kept)))


def test_a_run_may_start_and_stop_at_any_level():
    knots = Within(Trailing(), -2.0, 3.0).knots(Cosine(), 5)
    samples = []
    start = torch.zeros(64, 2, dtype=torch.float64)
    x, _ = integrate(
        ORACLE, paint(), start, knots, NOISE, callback=lambda _, state, __: samples.append(state.x)
    )
    for sample_at_knot, knot in ((samples[0], knots[0]), (x, knots[-1])):
        z = (sample_at_knot[:, 0] - knot.alpha * IMAGE[0]) / knot.sigma
        assert z.std() == pytest.approx(1, abs=0.3)
    assert (samples[0][:, 1] == 0).all()


def test_the_loop_never_reads_the_sample():
    noise = Noise(torch.arange(4), (2,), torch.device("meta"), torch.float64)
    sampler = RePaint(DDIM(1.0), IMAGE.to("meta"), MASK.to("meta"), 2, 3)
    state = sampler.start(noise.start(), Trailing().knots(Cosine(), 5), noise)
    while not state.done:
        state = sampler.advance(state, Prediction(state.x, state.x), noise)
    assert state.x.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RePaint(DDIM(), IMAGE, torch.ones(2)),
            "mask holds torch.float32, expected booleans",
        ),
        (
            lambda: RePaint(DDIM(), IMAGE, torch.ones(3, 2, dtype=torch.bool)),
            r"mask has shape \(3, 2\), expected one that broadcasts to",
        ),
        (lambda: paint(jump=0), "jump and resamplings are 0 and 3"),
        (lambda: paint(resamplings=0), "jump and resamplings are 2 and 0"),
        (
            lambda: integrate(
                ORACLE, paint(), NOISE.start(), Explicit((3.0, 0.0)).knots(Cosine(), 1), NOISE
            ),
            "expected two or more that fall in noise",
        ),
    ],
)
def test_invalid_arguments_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_alpha_blending_is_evaluated_at_its_midpoints():
    assert paint(AlphaBlending(2), 1, 1).evaluations(Trailing().knots(Cosine(), 6)) == 12


@pytest.mark.slow
def test_a_run_may_have_more_than_1365_segments():
    """Three branches for each segment: more than 4095 of them."""
    sampler, knots = paint(DDIM(1.0), 1, 500), Trailing().knots(Cosine(), 4)
    noise = Noise(torch.arange(2), (2,), dtype=torch.float64)
    x, evaluations = integrate(ORACLE, sampler, noise.start(), knots, noise)
    assert x[:, 0].tolist() == [IMAGE[0]] * 2
    assert evaluations == sampler.evaluations(knots) > 1490


def test_a_corrector_around_repaint_is_refused_and_one_inside_works():
    with pytest.raises(ValueError, match=r"put the corrector inside it, RePaint\(Predictor"):
        PredictorCorrector(paint())
    sampler, knots = paint(PredictorCorrector(DDIM(), 2)), Trailing().knots(Cosine(), 6)
    x, evaluations = integrate(ORACLE, sampler, NOISE.start(), knots, NOISE)
    assert evaluations == sampler.evaluations(knots)
    assert (x[:, 0] == IMAGE[0]).all()


def test_restart_around_repaint_has_fresh_noise_at_the_known_pixels_of_each_restart():
    levels, drawn = [], []
    restart = Restart(RePaint(DDIM(), IMAGE, MASK, 1, 1), ((0.3, 2.0, 2, 3),))
    knots = Karras(0.05, 20.0).knots(Cosine(), 5)

    def record(_, state, __):
        z = (state.x[:, 0] - state.level.alpha * IMAGE[0]) / state.level.sigma
        levels.append(state.level.ratio)
        drawn.append(z)

    integrate(ORACLE, restart, NOISE.start(), knots, NOISE, callback=record)
    begin = [i for i, ratio in enumerate(levels) if abs(ratio - 2.0) < 1e-9]
    assert len(begin) == 3
    known = torch.stack([NOISE.start()[:, 0], *(drawn[i] for i in begin)])
    assert (known.corrcoef() - torch.eye(4)).abs().max() < 0.5


def test_images_may_be_one_for_each_sample_of_the_batch():
    images = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    sampler = RePaint(DDIM(1.0), images, MASK, 2, 2)
    arguments = {"steps": 5, "seeds": range(4), "dtype": torch.float64}
    result = sample(ORACLE, sampler, Trailing(), batch_size=4, **arguments)
    assert torch.equal(result.x[:, 0], images[:, 0])
    assert result.planned == result.evaluations
    with pytest.raises(ValueError, match=r"image has shape \(4, 2\), expected \(2,\), the same"):
        sample(ORACLE, sampler, Trailing(), **arguments)
