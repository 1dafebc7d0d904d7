"""From seeds to samples: right from pure noise, each from its own seed alone, refused where it
would be wrong.
"""

import math
from functools import cache

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import TimeConditioning
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import (
    BetaSpacing,
    Cosine,
    Discrete,
    Explicit,
    Flow,
    Karras,
    Leading,
    Linspace,
    Quadratic,
    Trailing,
    UniformBlend,
    UniformLogSNR,
    Within,
    ZeroTerminalSNR,
)
from tests.helpers.oracles import (
    SCALINGS,
    TO_NOISE,
    ExactNetwork,
    flow,
    gaussian,
    mixture,
    process,
    unet,
)
from tests.helpers.products import sampled
from tests.samplers.test_orders import ORDERS

SEEDS = (11, 2, 7, 30, 5, 1, 4)
LABELS = (0, 1, 1, 0, 2, 1, 0)


class Network(nn.Module):
    """A small conditional network that counts its rows; it has a dropout, so its mode matters."""

    def __init__(self, fail=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))
        self.frozen = nn.Dropout(0.5).eval()
        self.rows, self.given, self.modes, self.fail = [], [], set(), fail

    def forward(self, x, time, class_labels=None):
        if self.fail:
            raise RuntimeError("the network failed")
        labels = torch.zeros(len(x)) if class_labels is None else class_labels
        self.rows.append(len(x))
        self.given.append(x)
        self.modes |= {module.training for module in self.modules()}
        return self.layers(torch.cat((x, time[:, None] / 1000, labels[:, None]), 1).to(x))


def small(**fields):
    torch.manual_seed(0)
    return Denoiser(Network(), process(**fields)).eval()


DENOISER = Denoiser(unet(), process(shape=(1, 8, 8))).eval()


def draw(seeds, labels, batch_size=4, guidance=CFG(2.0)):
    """Images of a real network, with fresh noise and a reference."""
    return sample(
        DENOISER,
        DDIM(1.0),
        Trailing(),
        4,
        seeds=seeds,
        condition=labels,
        guidance=guidance,
        batch_size=batch_size,
    ).x


@cache
def exact_from_noise(name):
    record = process(TO_NOISE[name])
    oracle, schedule = mixture(record), record.schedule
    x = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64).start()
    return flow(oracle, x, schedule.level(1.0), schedule.at(math.inf))


@pytest.mark.parametrize("kind", ("sample", "v_prediction", "flow_prediction", "edm"))
@pytest.mark.parametrize("name", TO_NOISE)
def test_sampling_starts_at_alpha_0_and_follows_the_exact_flow(name, kind):
    """The midpoint rule errs by 2e-5 at 200 steps, and 4 times that at 100."""
    record = process(TO_NOISE[name], prediction=kind)
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    result = sample(
        denoiser, AlphaBlending(2), Trailing(), 200, seeds=SEEDS, batch_size=7, dtype=torch.float64
    )
    assert (result.knots[0].alpha, result.knots[0].sigma, result.knots[-1].sigma) == (0, 1, 0)
    torch.testing.assert_close(result.x, exact_from_noise(name), rtol=0, atol=5e-5)


REFUSED_AT_NOISE = [
    ({"prediction": "epsilon"}, "v_prediction"),
    ({"time": TimeConditioning("logsnr", 1.0)}, "clamp"),
    ({"time": TimeConditioning("sigma", 1.0)}, "clamp"),
    ({"schedule": Cosine(scaling="ve")}, "vp or flow"),
]


@pytest.mark.parametrize(("fields", "remedy"), REFUSED_AT_NOISE)
def test_what_cannot_start_at_alpha_0_is_refused_with_the_remedy_before_the_network_is_called(
    fields, remedy
):
    denoiser = small(**fields)
    with pytest.raises(ValueError, match=f"pure noise.*{remedy}"):
        sample(denoiser, steps=5, seeds=SEEDS)
    assert denoiser.network.rows == []


@pytest.mark.parametrize(("fields", "remedy"), REFUSED_AT_NOISE)
def test_the_same_network_samples_from_a_finite_level(fields, remedy):
    record = process(**fields)
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    result = sample(
        denoiser,
        grid=UniformLogSNR(-8.0, 8.0),
        steps=5,
        seeds=SEEDS,
        dtype=torch.float64,
        batch_size=7,
    )
    truth = sample(
        mixture(record),
        grid=UniformLogSNR(-8.0, 8.0),
        steps=5,
        seeds=SEEDS,
        dtype=torch.float64,
        batch_size=7,
    )
    torch.testing.assert_close(result.x, truth.x, rtol=1e-9, atol=1e-9)
    assert len(denoiser.network.calls) == 5


@pytest.mark.parametrize("n", (1, 10, 60, 61, 103, 998))
@pytest.mark.parametrize(
    "schedule", (Discrete(), ZeroTerminalSNR(Discrete())), ids=("finite", "zero terminal")
)
def test_every_number_of_trailing_steps_reaches_the_data(schedule, n):
    """On N(0, ½²) a run multiplies its noise by a number, the standard deviation; first order
    leaves it 1.5/n short.
    """
    oracle = gaussian([0.0], torch.tensor([[0.25]]), process(schedule, shape=(1,)))
    noise = Noise(torch.arange(3), (1,), dtype=torch.float64).start()
    result = sample(
        oracle, DDIM(), Trailing(), n, seeds=range(3), batch_size=3, dtype=torch.float64
    )
    std = (result.x / noise).abs()
    assert len(result.knots) == n + 1
    assert result.knots[-1].logsnr == math.inf
    assert ((std - 0.5).abs() < 1.6 / n).all()  # diffusers at n = 61: 73.7
    assert (std < 0.01).all() or n > 1  # one step is E[x_0]


def test_linspace_steps_between_neighbouring_knots():
    """The published-grid error for 10 steps on N(0, ½²); diffusers, which goes to t - T//n, has
    0.419.
    """
    oracle = gaussian([0.0], torch.tensor([[0.25]]), process(Discrete(), shape=(1,)))
    x = sample(oracle, DDIM(), Linspace(), 10, seeds=[1], batch_size=1, dtype=torch.float64).x
    noise = Noise(torch.tensor([1]), (1,), dtype=torch.float64).start()
    assert (x / noise).item() == pytest.approx(0.362, abs=1e-3)


def test_a_sample_is_bit_equal_whichever_seeds_are_beside_it_and_in_whatever_order():
    """Including the noise of the steps and of the reference."""
    images = draw(SEEDS, LABELS)
    order = (3, 0, 6, 5, 1, 4, 2)
    assert torch.equal(
        draw([SEEDS[i] for i in order], [LABELS[i] for i in order]), images[list(order)]
    )
    for i in (0, 4, 6):
        assert torch.equal(draw([SEEDS[i]], [LABELS[i]]), images[i : i + 1])
    more = draw([*SEEDS, 100, 101], [*LABELS, 1, 1])
    assert torch.equal(more[:7], images)
    assert len({image.sum().item() for image in more}) == 9


def test_another_batch_size_agrees_to_rounding():
    """A network's last bits depend on its number of rows."""
    torch.testing.assert_close(
        draw(SEEDS, LABELS, batch_size=3), draw(SEEDS, LABELS), rtol=0, atol=1e-4
    )


def test_each_seed_has_its_own_label():
    images = draw(SEEDS, LABELS)
    assert not torch.equal(draw(SEEDS, [0] * 7)[1], images[1])
    assert torch.equal(draw(SEEDS, [0] * 7)[0], images[0])


def test_without_a_condition_samples_are_those_of_the_null_label():
    assert torch.equal(
        draw(SEEDS, None, guidance=CFG(1.0)), draw(SEEDS, [2] * 7, guidance=CFG(1.0))
    )


@pytest.mark.parametrize(("guidance", "rows"), [(CFG(1.0), 4), (CFG(0.0), 8), (CFG(2.0), 8)])
@pytest.mark.parametrize("sampler", (DDIM(), AlphaBlending(2)), ids=str)
@pytest.mark.parametrize("count", (1, 4, 7))
def test_the_network_always_gets_a_full_batch_and_evaluations_are_counted(
    count, sampler, guidance, rows
):
    denoiser = small()
    result = sample(
        denoiser,
        sampler,
        steps=5,
        seeds=SEEDS[:count],
        condition=LABELS[:count],
        guidance=guidance,
        batch_size=4,
    )
    assert set(denoiser.network.rows) == {rows}
    assert result.x.shape == (count, 2)
    assert result.evaluations == sampler.evaluations(result.knots) * rows // 4
    assert sum(denoiser.network.rows) == result.evaluations * 4 * math.ceil(count / 4)


def test_an_unconditional_network_is_asked_without_labels():
    record = process(classes=0)
    denoiser = Denoiser(ExactNetwork(mixture(), record), record)
    sample(denoiser, steps=2, seeds=SEEDS)
    assert [labels for _, _, labels in denoiser.network.calls] == [None, None]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "grid", (Karras(), UniformLogSNR(-1.0, 9.0), Explicit((0.5, 2.0, math.inf))), ids=str
)
def test_the_first_sample_has_the_scale_of_the_data_and_the_noise_at_the_first_knot(grid, scaling):
    """√(α² s² + σ²) z with s the data's standard deviation."""
    denoiser = small(schedule=Cosine(scaling=scaling), prediction="flow_prediction", sigma_data=0.7)
    first = sample(denoiser, grid=grid, steps=2, seeds=SEEDS, batch_size=7).knots[0]
    u = math.exp(-first.logsnr / 2)
    expected = first.alpha * math.sqrt(0.49 + u**2) * Noise(torch.tensor(SEEDS), (2,)).start()
    torch.testing.assert_close(denoiser.network.given[0], expected, rtol=1e-6, atol=0)


def test_pure_noise_starts_from_the_noise_itself():
    denoiser = small()
    sample(denoiser, steps=2, seeds=SEEDS, batch_size=7)
    assert torch.equal(denoiser.network.given[0], Noise(torch.tensor(SEEDS), (2,)).start())


@pytest.mark.parametrize("fail", (False, True))
def test_the_network_is_evaluated_without_dropout_and_its_modes_are_restored(fail):
    network = Network(fail)
    denoiser = Denoiser(network, process()).train()
    network.frozen.eval()
    before = [module.training for module in denoiser.modules()]
    if fail:
        with pytest.raises(RuntimeError, match="the network failed"):
            sample(denoiser, steps=2, seeds=SEEDS)
    else:
        sample(denoiser, steps=2, seeds=SEEDS)
        assert network.modes == {False}
    assert [module.training for module in denoiser.modules()] == before
    assert True in before
    assert False in before


def test_sampling_tracks_no_gradients():
    assert not sample(small(), steps=2, seeds=SEEDS).x.requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_samples_have_the_dtype_that_they_were_integrated_in(dtype):
    assert sample(small(), steps=2, seeds=SEEDS, dtype=dtype).x.dtype == dtype


@pytest.mark.parametrize("seed", (-1, 2**40, 2**63 - 1))
def test_seeds_have_64_bits(seed):
    x = sample(small(), steps=2, seeds=[seed, 0, seed % 2**32]).x
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": [0, 1, 3]}, r"labels \[3\] are out of range"),
        ({"condition": [0, -1, 1]}, r"labels \[-1\] are out of range"),
        ({"condition": [0, 1]}, "one label for each of 3 seeds"),
        ({"condition": None, "guidance": CFG(2.0)}, "needs a condition"),
        ({"seeds": [], "condition": []}, "seeds is empty"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"grid": Explicit((-1.0, 0.0)), "steps": 3}, "steps is 3"),
    ],
    ids=str,
)
def test_wrong_calls_are_refused_before_the_network_is_called(changes, message):
    denoiser = small()
    arguments = {"steps": 4, "seeds": [1, 2, 3], "condition": [0, 1, 0]} | changes
    with pytest.raises(ValueError, match=message):
        sample(denoiser, **arguments)
    assert denoiser.network.rows == []


@pytest.mark.parametrize("w", (0.0, 2.0))
def test_guidance_without_condition_dropout_is_refused(w):
    denoiser = small(dropout=0.0)
    with pytest.raises(ValueError, match=r"without condition dropout.*CFG\(1\.0\)"):
        sample(denoiser, steps=4, seeds=[1], condition=[0], guidance=CFG(w))
    assert denoiser.network.rows == []
    sample(denoiser, steps=4, seeds=[1], condition=[0], guidance=CFG(1.0), batch_size=1)
    assert denoiser.network.rows == [1] * 4


def test_a_condition_for_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="no classes"):
        sample(small(classes=0), steps=2, seeds=[1], condition=[0])


@pytest.mark.parametrize("grid", (Trailing(), Linspace()), ids=str)
def test_more_steps_than_a_table_has_are_refused(grid):
    denoiser = small(schedule=Discrete(steps=100))
    with pytest.raises(ValueError, match="table of 100"):
        sample(denoiser, grid=grid, steps=101, seeds=[1])
    assert denoiser.network.rows == []


def test_a_network_trained_on_one_schedule_is_sampled_on_another_s_levels():
    """TimeSampling are matched in λ, so knots of Flow's uniform a serve a network of the cosine
    schedule.
    """
    grid = Explicit(tuple(knot.logsnr for knot in Trailing().knots(Flow(), 20)))
    record = process(Cosine())
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    x = sample(denoiser, grid=grid, steps=20, seeds=SEEDS, dtype=torch.float64, batch_size=7).x
    own = sample(
        mixture(process(Flow())),
        grid=Trailing(),
        steps=20,
        seeds=SEEDS,
        dtype=torch.float64,
        batch_size=7,
    ).x
    torch.testing.assert_close(x, own, rtol=1e-9, atol=1e-9)


def test_the_bar_counts_samples_and_not_padding(capsys):
    sample(small(), steps=2, seeds=SEEDS, batch_size=4, progress=True)
    assert "7/7" in capsys.readouterr().err
    sample(small(), steps=2, seeds=SEEDS, batch_size=4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_network_that_knows_nothing_at_the_clean_end_is_not_asked_there(kind):
    rising = Explicit((math.inf, 2.0, -3.0))
    denoiser = mixture(process(prediction=kind))
    if kind == "sample":
        with pytest.raises(ValueError, match="clean"):
            sample(denoiser, grid=rising, steps=2, seeds=SEEDS)
    else:
        assert sample(denoiser, grid=rising, steps=2, seeds=SEEDS, batch_size=7).x.isfinite().all()


def test_a_run_to_pure_noise_in_ve_is_refused():
    with pytest.raises(ValueError, match="last knot is pure noise"):
        sample(
            mixture(process(Cosine(scaling="ve"))),
            grid=Explicit((3.0, 0.0, -math.inf)),
            steps=2,
            seeds=SEEDS,
        )


# Starting and stopping anywhere


ANY_SAMPLER = [*ORDERS, DDIM(0.5), DDIM(1.0)]
EVENS = [
    Trailing(),
    Linspace(),
    Leading(),
    Quadratic(),
    BetaSpacing(),
    Karras(),
    UniformLogSNR(),
    UniformBlend(),
]


@pytest.mark.parametrize(
    ("sampler", "start", "scaling"),
    sampled(list(ANY_SAMPLER), (0.05, 1.0, 20.0), SCALINGS, count=50),
)
def test_the_noise_put_on_an_image_is_sigma_of_the_start_level_exactly(sampler, start, scaling):
    """Whatever the sampler, the steps and the grid: strength is a noise level, not a share of the
    steps.
    """
    image, z = torch.tensor([0.3, -0.7]), Noise(torch.tensor(SEEDS), (2,)).start()
    for grid, steps in zip(EVENS, (1, 2, 3, 4, 5, 7, 8, 50), strict=True):
        denoiser = small(schedule=Cosine(scaling=scaling), prediction="flow_prediction")
        grid = Within(grid, low=-2 * math.log(start))
        sample(
            denoiser,
            sampler,
            grid,
            steps,
            seeds=SEEDS,
            image=image,
            batch_size=7,
            callback=lambda *_: True,
        )
        first = grid.knots(denoiser.process.schedule, steps)[0]
        assert first.sigma / first.alpha == pytest.approx(start, rel=1e-12)
        injected = (denoiser.network.given[0] - first.alpha * image) / first.sigma
        torch.testing.assert_close(injected, z, rtol=0, atol=1e-5 * (1 + 1 / start))


def test_an_image_for_each_seed_or_one_for_all():
    images = torch.arange(14.0).view(7, 2) / 10
    arguments = {
        "grid": Within(Trailing(), low=1.0),
        "steps": 3,
        "seeds": SEEDS,
        "batch_size": 4,
        "dtype": torch.float64,
    }
    one, each = (sample(mixture(), image=image, **arguments).x for image in (images[2], images))
    assert torch.equal(one[2], each[2])
    assert not torch.equal(one[3], each[3])
    assert torch.equal(sample(mixture(), image=images[2:3], **arguments).x, one)


def test_a_run_from_little_noise_keeps_the_image_and_one_from_much_forgets_it():
    image = mixture().sample(torch.arange(7))
    kept, forgotten = (
        sample(
            mixture(),
            grid=Within(Trailing(), low=low),
            seeds=SEEDS,
            image=image,
            dtype=torch.float64,
        ).x
        - image
        for low in (7.0, -9.0)
    )
    assert kept.norm(dim=1).max() < 0.1
    assert forgotten.norm(dim=1).median() > 0.5


@pytest.mark.parametrize("high", (-2.0, 0.5, 6.0))
def test_a_run_stops_at_a_level_on_the_exact_flow(high):
    oracle = mixture()
    grid = Within(UniformBlend(), high=high)
    result = sample(
        oracle, AlphaBlending(2), grid, 400, seeds=SEEDS, dtype=torch.float64, batch_size=7
    )
    x = Noise(torch.tensor(SEEDS), (2,), dtype=torch.float64).start()
    schedule = oracle.process.schedule
    exact = flow(oracle, x, schedule.level(1.0), schedule.at(high))
    assert result.knots[-1].logsnr == high
    torch.testing.assert_close(result.x, exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("image", "grid", "message"),
    [
        (
            torch.zeros(3),
            Within(Trailing(), low=0.0),
            r"image has shape \(3,\), expected \(2,\), or one of these for",
        ),
        (torch.zeros(6, 2), Within(Trailing(), low=0.0), r"image has shape \(6, 2\)"),
        (torch.zeros(2), Trailing(), "first knot is pure noise, which keeps nothing of the image"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_the_network_is_called(image, grid, message):
    denoiser = small()
    with pytest.raises(ValueError, match=message):
        sample(denoiser, grid=grid, steps=3, seeds=SEEDS, image=image)
    assert denoiser.network.rows == []


@pytest.mark.parametrize("sampler", ANY_SAMPLER, ids=str)
def test_a_callback_sees_every_state_and_prediction_and_changes_nothing(sampler):
    seen, oracle = [], mixture()
    arguments = {"steps": 5, "seeds": SEEDS, "dtype": torch.float64, "batch_size": 7}
    watched = sample(oracle, sampler, callback=lambda *call: seen.append(call), **arguments)
    assert torch.equal(watched.x, sample(oracle, sampler, **arguments).x)
    assert len(seen) == watched.evaluations == sampler.evaluations(watched.knots)
    for step, state, prediction in seen:
        assert step == state.step == len(watched.knots) - 1 - len(state.remaining)
        torch.testing.assert_close(prediction, oracle(state.x, state.level), rtol=0, atol=0)


@pytest.mark.parametrize("stop", (0, 2))
def test_a_callback_that_says_true_stops_the_run_with_x_at_its_level(stop):
    kept = []

    def callback(step, state, prediction):
        kept.append(state)
        return step == stop

    denoiser = small()
    result = sample(denoiser, DDIM(), steps=5, seeds=SEEDS[:4], batch_size=4, callback=callback)
    assert result.evaluations == len(denoiser.network.rows) == stop + 1
    assert kept[-1].level == result.knots[stop]
    assert torch.equal(result.x, kept[-1].x)
    knots, noise = kept[-1].remaining, Noise(torch.tensor(SEEDS[:4]), (2,))
    rest, _ = integrate(denoiser, DDIM(), result.x, (kept[-1].level, *knots), noise)
    assert torch.equal(rest, sample(denoiser, DDIM(), steps=5, seeds=SEEDS[:4], batch_size=4).x)


def test_a_callback_stops_the_chunk_that_it_is_called_for():
    denoiser, calls = small(), []
    sample(
        denoiser,
        steps=5,
        seeds=SEEDS,
        batch_size=4,
        callback=lambda *call: bool(calls.append(call)) or len(calls) == 2,
    )
    assert len(denoiser.network.rows) == 2 + 5
