"""Properties of all samplers: states are values, runs are independent, and the loop never reads
samples on the host.
"""

import copy
import dataclasses
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AdaptiveRungeKutta,
    AlphaBlending,
    Euler,
    GradientEstimation,
    Heun,
    Restart,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit, Flow, Karras, Trailing
from tests.helpers.oracles import SCALINGS, PointMass, mixture, process
from tests.helpers.products import sampled, thinned
from tests.samplers.test_orders import ORDERS
from tests.samplers.test_weak_orders import WEAK

SAMPLERS = [
    *(sampler for sampler in ORDERS if getattr(sampler, "k", 3) == 3),
    AdamsBashforth.ipndm(4),
    *WEAK,
]
SAMPLERS += [Euler(4.0), Heun(4.0), GradientEstimation(2.0, 0.5)]


def inner_sampler(sampler):
    """The sampler that takes the steps: the inner one of a wrapper."""
    return getattr(sampler, "inner", sampler)


def has_midpoints(sampler):
    """Whether a single step is not the first-order step."""
    return isinstance(inner_sampler(sampler), AlphaBlending) and inner_sampler(sampler).order == 2


def is_finite_at_ends(sampler):
    """Whether the sampler needs no first-order step at the ends α = 0 and σ = 0."""
    flows = (AdamsBashforth.flow(2), AdamsBashforth.flow(3))
    forms = (*flows, AdamsMoulton(3), AdamsMoulton(3, every=2))
    return has_midpoints(sampler) or inner_sampler(sampler) in forms


ORACLE = mixture()
KNOTS, SHORT = (Trailing().knots(ORACLE.process.schedule, steps) for steps in (6, 4))


def noise_of(first, count=4):
    return Noise(torch.arange(first, first + count), (2,), dtype=torch.float64)


NOISE = noise_of(0)


def states(sampler, state, noise):
    """The state and all later ones."""
    yield state
    while not state.done:
        state = sampler.advance(state, ORACLE(state.x, state.level), noise)
        yield state


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_stored_or_copied_state_continues_bit_for_bit(sampler):
    kept = list(states(sampler, sampler.start(NOISE.start(), SHORT, NOISE), NOISE))
    frozen = [copy.deepcopy(state) for state in kept]  # copies made before the run continues
    assert len(kept) == sampler.evaluations(SHORT) + 1
    for state, was in zip(kept, frozen, strict=True):
        for begin in (state, was, pickle.loads(pickle.dumps(state))):
            *_, last = states(sampler, begin, noise_of(0))
            assert torch.equal(last.x, kept[-1].x)
    for state, was in zip(kept, frozen, strict=True):  # the continued runs have changed no state
        assert torch.equal(state.x, was.x)
        assert (state.level, state.remaining, state.step) == (was.level, was.remaining, was.step)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_advance_changes_neither_the_state_nor_the_prediction(sampler):
    for state in states(sampler, sampler.start(NOISE.start(), KNOTS, NOISE), NOISE):
        if not state.done:
            prediction, x = ORACLE(state.x, state.level), state.x.clone()
            before = [value.clone() for value in prediction]
            sampler.advance(state, prediction, NOISE)
            assert torch.equal(state.x, x)
            assert all(torch.equal(a, b) for a, b in zip(prediction, before, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samplers_and_states_are_immutable(sampler):
    state = sampler.start(NOISE.start(), KNOTS, NOISE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.x = NOISE.start()
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.last = 1


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_state_is_at_a_knot_after_each_step(sampler):
    if getattr(sampler, "churn", 0):
        pytest.skip("with churn the level is noisier than the knot")
    visited = {}
    for state in states(sampler, sampler.start(NOISE.start(), KNOTS, NOISE), NOISE):
        visited.setdefault(state.step, state.level)
    if isinstance(sampler, Restart):  # also visits levels between the knots
        visited = dict(enumerate(level for level in visited.values() if level in KNOTS))
    assert visited == dict(enumerate(KNOTS))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_four_threads_that_share_sampler_and_denoiser_equal_four_serial_runs(sampler):
    torch.manual_seed(0)
    denoiser = Denoiser(Network(), ORACLE.process)
    labels = torch.tensor([0, 1, 1, 0])

    def one(i):
        noise = noise_of(100 * i)
        with torch.no_grad():  # gradients are switched off per thread
            return integrate(
                denoiser,
                sampler,
                noise.start(),
                Trailing().knots(Cosine(), 4 + i),
                noise,
                CFG(2.0),
                labels,
            )[0]

    serial = [one(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(one, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded, strict=True))
    assert not torch.equal(serial[0], serial[1])


class Network(nn.Module):
    """A small conditional network in float64."""

    def __init__(self):
        super().__init__()
        self.classes = nn.Embedding(3, 2, dtype=torch.float64)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)).double()

    def forward(self, x, time, class_labels):
        return self.layers(torch.cat((x + self.classes(class_labels), time[:, None] / 1000), 1))


class DataDependentSampler(DDIM):
    """An invalid sampler, whose step depends on a value of the sample."""

    def advance(self, state, prediction, noise):
        return (
            super().advance(state, prediction, noise)
            if state.x.sum() > 0
            else state.at_next_knot(state.x)
        )


HOST_READS = {
    "item",
    "tolist",
    "nonzero",
    "cpu",
    "numpy",
    "equal",
    "allclose",
    "argwhere",
    "masked_select",
    "unique",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__len__",
    "__contains__",
    "__array__",
}


class UnreadableTensor(torch.Tensor):
    """A tensor whose data raises AssertionError when it is read on the host."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in HOST_READS:
            raise AssertionError(f"the loop reads the sample: {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def run_with_unreadable_samples(sampler, knots):
    """The result of an exact denoiser, with unreadable samples and predictions."""
    state = sampler.start(NOISE.start().as_subclass(UnreadableTensor), knots, NOISE)
    while not state.done:
        x0, eps = ORACLE(state.x.as_subclass(torch.Tensor), state.level)
        state = sampler.advance(
            state,
            Prediction(x0.as_subclass(UnreadableTensor), eps.as_subclass(UnreadableTensor)),
            NOISE,
        )
    return state.x


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_sampler_never_reads_a_value_of_the_sample_on_the_host(sampler):
    x = run_with_unreadable_samples(sampler, KNOTS)
    assert isinstance(x, UnreadableTensor)
    assert torch.equal(
        x.as_subclass(torch.Tensor), integrate(ORACLE, sampler, NOISE.start(), KNOTS, NOISE)[0]
    )


@pytest.mark.parametrize("sampler", (AdaptiveRungeKutta(), None), ids=str)
def test_a_sampler_that_reads_a_value_of_the_sample_is_detected(sampler):
    """The adaptive pair is the only sampler of the library that reads values."""
    with pytest.raises(AssertionError, match="reads the sample"):
        run_with_unreadable_samples(sampler or DataDependentSampler(), KNOTS)


def run_without_data(sampler):
    """The result on the device `meta`, whose tensors have no data, so reading a value fails."""
    noise = Noise(torch.arange(4), (2,), torch.device("meta"), torch.float64)
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    return integrate(
        Denoiser(Network(), ORACLE.process).to("meta"),
        sampler,
        torch.empty(4, 2, dtype=torch.float64, device="meta"),
        SHORT,
        noise,
        CFG(2.0),
        labels,
    )


@pytest.mark.parametrize("sampler", thinned([(each,) for each in SAMPLERS], 25), ids=str)
def test_the_loop_runs_without_data(sampler):
    x, evaluations = run_without_data(sampler)
    assert x.is_meta
    assert evaluations == 2 * sampler.evaluations(SHORT)


def test_the_noise_at_the_start_is_drawn_without_data():
    noise = Noise(torch.arange(4), (2,), torch.device("meta"), torch.float64)
    assert noise.start().is_meta


def test_a_loop_that_reads_a_value_of_the_sample_is_detected():
    with pytest.raises(RuntimeError, match="meta"):
        run_without_data(DataDependentSampler())


@pytest.mark.parametrize(
    ("sampler", "scaling"),
    sampled([s for s in SAMPLERS if not is_finite_at_ends(s)], SCALINGS, count=40),
    ids=str,
)
def test_the_clean_step_is_x0_bit_for_bit(sampler, scaling):
    knots = Explicit((-3.0, 0.5, 1.0, 3.5, math.inf)).knots(Cosine(scaling=scaling), 4)
    *_, evaluated, last = states(sampler, sampler.start(NOISE.start(), knots, NOISE), NOISE)
    assert torch.equal(last.x, ORACLE(evaluated.x, evaluated.level).x0)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    sampled(SAMPLERS, (Cosine(), Cosine(scaling="ve"), Flow(), Discrete()), count=50),
    ids=str,
)
def test_no_noise_remains_on_a_point_mass(sampler, schedule):
    """The result is x_0; samplers in a have rounding errors of terms of size |x| ≤ 300."""
    truth = PointMass(torch.tensor([0.7, -1.3], dtype=torch.float64), process(schedule))
    knots = Karras(sigma_max=80.0).knots(schedule, 10)
    x, _ = integrate(truth, sampler, knots[0].sigma * NOISE.start(), knots, NOISE)
    torch.testing.assert_close(
        x, truth.point.expand(4, 2), rtol=0, atol=1e-13 if is_finite_at_ends(sampler) else 0
    )


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if not isinstance(s, Restart)], ids=str)
def test_one_step_from_pure_noise_to_data(sampler):
    """The first-order step gives E[x_0].

    The midpoint rule gives x - (ε - x_0) evaluated at the mean of x and E[x_0].
    """
    knots = Trailing().knots(Flow(), 1)
    oracle, x = mixture(process(Flow())), NOISE.start()
    mean = oracle(x, knots[0]).x0
    half = oracle((x + mean) / 2, Flow().level(0.5))
    expected = x - (half.eps - half.x0) if has_midpoints(sampler) else mean
    torch.testing.assert_close(
        integrate(oracle, sampler, x, knots, NOISE)[0], expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "logsnrs", ((-3.0, 0.0, 2.0), (4.0, 1.0, -3.0)), ids=("to data", "to noise")
)
@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler in ORDERS], ids=str)
def test_runs_start_and_end_at_any_level_and_only_heun_evaluates_the_last(sampler, logsnrs):
    knots = Explicit(logsnrs).knots(Cosine(), 2)
    *evaluated, last = states(sampler, sampler.start(NOISE.start(), knots, NOISE), NOISE)
    assert last.level == knots[-1]
    assert isinstance(sampler, Heun) or all(state.level != knots[-1] for state in evaluated)
    assert {knot.logsnr for knot in knots[:-1]} <= {state.level.logsnr for state in evaluated}


@pytest.mark.parametrize("sampler", [*SAMPLERS, Restart(DDIM(), ((1.0, 2.0, 2, 1),))], ids=str)
def test_a_sampler_draws_noise_exactly_if_its_result_depends_on_it(sampler):
    """The same first x with the noise of other seeds."""
    oracle = mixture()
    knots = Explicit((-4.0, -2.0, 0.0, 2.0, 4.0)).knots(oracle.process.schedule, 4)
    x = Noise(torch.arange(3), (2,), dtype=torch.float64).start()
    ends = [
        integrate(oracle, sampler, x, knots, Noise(seeds, (2,), dtype=torch.float64))[0]
        for seeds in (torch.arange(3), torch.arange(3) + 50)
    ]
    assert sampler.draws_noise(knots) != torch.equal(*ends)
