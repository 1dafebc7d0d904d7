"""Options of the objective: perturbed and offset noise, half precision, level maps, and errors."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.objective import Objective
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.weighting import EDM, ELBO, MSE, MinSNR
from diffcore.schedules import (
    Beta,
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Laplace,
    LogLinear,
    Mode,
    Normal,
    Rho,
    Sigmoid,
    Truncated,
)
from tests.helpers.oracles import PREDICTION_TYPES, SCALINGS

SEED, STEP, BATCH = 7, 3, 24
KEY = SampleKey(SEED, STEP, torch.arange(BATCH), BATCH)


def at(key: SampleKey, rows: Tensor) -> SampleKey:
    """The key of the samples of a rank or of a micro-batch."""
    return replace(key, index=rows)


class Affine(nn.Module):
    """A network in closed form: cos(x) + time / 1000 + 0.1."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.cos() + time.view(-1, 1, 1, 1) / 1000 + 0.1


class ZeroNetwork(nn.Module):
    """A network with output 0, so that the loss is the mean square of the target."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.x, self.time = x, time
        return torch.zeros_like(x)


def noised(objective, record, x0, key):
    """(x - α x_0) / σ at the network's input x, the draw, and the losses."""
    network, draw = ZeroNetwork(), objective.draw(record, key)
    losses = objective(Denoiser(network, record), x0, None, draw)
    level = draw.level.to(x0)
    return (network.x - level.alpha * x0) / level.sigma, draw, losses


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_ddpm_ip_perturbs_x_and_keeps_the_target(gamma):
    record = Process(LogLinear(-2.0, 2.0), "epsilon", shape=(2, 5, 5))
    x0 = torch.rand(400, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = SampleKey(0, 4, torch.arange(400), 400)
    noisy, draw, losses = noised(Objective(MSE("epsilon"), perturbation=gamma), record, x0, key)
    plain, other, expected = noised(Objective(MSE("epsilon")), record, x0, key)
    assert torch.equal(draw.noise, other.noise)
    assert torch.equal(draw.level.t, other.level.t)
    assert torch.equal(losses, expected)  # the target is ε
    extra = (noisy - plain) / gamma
    torch.testing.assert_close(
        extra.float(), normal(0, Stream.PERTURBATION, key.position, (2, 5, 5)), rtol=0, atol=1e-5
    )
    assert abs(np.corrcoef(extra.flatten(), plain.flatten())[0, 1]) < 4 / math.sqrt(20_000)
    assert noisy.var().item() == pytest.approx(
        1 + gamma**2, abs=4 * (1 + gamma**2) * math.sqrt(2 / 20_000)
    )


def test_offset_noise_is_shared_within_a_channel_and_is_in_the_target():
    """Cov[n_i, n_j] = 1[i = j] + s² within a channel, 1[i = j] between channels and samples."""
    s, n = 0.7, 4000
    record = Process(LogLinear(-2.0, 2.0), "epsilon", shape=(2, 2, 2))
    x0 = torch.rand(n, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = SampleKey(0, 4, torch.arange(n), n)
    noisy, draw, losses = noised(Objective(MSE("epsilon"), offset=s), record, x0, key)
    torch.testing.assert_close(noisy.float(), draw.noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        losses, draw.noise.double().square().mean((1, 2, 3)), rtol=1e-6, atol=0
    )
    plain = Objective().draw(record, key).noise
    offset = (draw.noise - plain) / s
    assert (offset - offset[:, :, :1, :1]).abs().max() < 1e-5
    expected = normal(0, Stream.OFFSET, key.position, (2, 1, 1))
    torch.testing.assert_close(offset[:, :, :1, :1], expected, rtol=0, atol=1e-5)
    result = np.cov(draw.noise.flatten(1).double().numpy().T)
    expected = np.eye(8) + s**2 * np.kron(np.eye(2), np.ones((4, 4)))
    np.testing.assert_allclose(result, expected, rtol=0, atol=5 * (1 + s**2) / math.sqrt(n))


def test_offset_and_perturbation_are_independent_of_each_other():
    record = Process(LogLinear(-2.0, 2.0), "epsilon", shape=(1, 2, 2))
    both = Objective(perturbation=0.3, offset=0.2).draw(record, KEY)
    assert torch.equal(both.noise, Objective(offset=0.2).draw(record, KEY).noise)
    assert torch.equal(
        both.perturbation, Objective(perturbation=0.3).draw(record, KEY).perturbation
    )
    assert Objective(offset=0.2).draw(record, KEY).perturbation is None


@pytest.mark.parametrize("parts", [2, 8])
def test_perturbation_and_offset_do_not_depend_on_the_split_of_the_batch(parts):
    objective, record = (
        Objective(perturbation=0.3, offset=0.2, corrected=True),
        Process(shape=(2, 2, 3)),
    )
    whole = objective.draw(record, KEY)
    for rows in torch.randperm(BATCH, generator=torch.Generator().manual_seed(0)).split(
        BATCH // parts
    ):
        part = objective.draw(record, at(KEY, rows))
        assert torch.equal(part.noise, whole.noise[rows])
        assert torch.equal(part.perturbation, whole.perturbation[rows])
        torch.testing.assert_close(part.importance, whole.importance[rows], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["perturbation", "offset"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_strengths_out_of_range_are_refused(name, value):
    with pytest.raises(
        ValueError, match=f"{name} is {value}, expected a finite number of at least 0"
    ):
        Objective(**{name: value})


def test_draw_and_loss_neither_read_nor_change_the_global_generator():
    objective = Objective(
        corrected=True,
        perturbation=0.1,
        offset=0.1,
        coupling=OptimalTransport(4),
        resampler=LearnedSchedule(),
    )
    record = Process(shape=(1, 2, 2))
    result = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        x0 = torch.linspace(-1, 1, BATCH * 4).view(BATCH, 1, 2, 2)
        draw = objective.draw(record, KEY, state=LearnedSchedule().initial_state())
        result.append(objective(Denoiser(ZeroNetwork(), record), x0, None, draw))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_of_half_precision_data_is_computed_in_float32(prediction_type, dtype):
    """The same loss as for float32 data: α, σ, w and the importance are not rounded to half."""
    objective, record = (
        Objective(MinSNR(), corrected=True),
        Process(Laplace(), prediction_type, shape=(1, 2, 2)),
    )
    x0 = torch.linspace(-1, 1, BATCH * 4).view(BATCH, 1, 2, 2).to(dtype)
    draw = objective.draw(record, KEY)
    for value in (
        draw.level.logsnr,
        draw.level.t,
        draw.level.alpha,
        draw.level.sigma,
        draw.importance,
    ):
        assert value.dtype == torch.float64
    losses = objective(Denoiser(Affine(), record), x0, None, draw)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, objective(Denoiser(Affine(), record), x0.float(), None, draw))
    exact = objective(Denoiser(Affine(), record), x0.double(), None, draw)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-3, atol=0)


class Map(nn.Module):
    """A network conditioned on a map of times: cos(x) + time / 1000 + 0.1."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        assert time.shape == x.shape
        return x.cos() + time / 1000 + 0.1


def guess(prediction_type, F, x, alpha, sigma, s):
    """x̂_0 computed with numpy."""
    norm, scale = np.sqrt(alpha**2 + sigma**2), np.sqrt(sigma**2 + alpha**2 * s**2)
    return {
        "epsilon": (x - sigma * F) / alpha,
        "sample": F,
        "v_prediction": (alpha * x / norm - sigma * F) / norm,
        "flow_prediction": (x - sigma * F) / (alpha + sigma),
        "edm": alpha * s**2 / scale**2 * x + sigma * s / scale * F,
    }[prediction_type]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_and_prediction_accept_a_map_of_levels(prediction_type, scaling):
    """SVNR: each pixel has its λ; the loss is the mean of the weighted errors of the pixels."""
    shape = (4, 2, 3, 3)
    record = Process(Normal(scaling=scaling), prediction_type, shape=shape[1:], sigma_data=0.6)
    t = torch.linspace(0.02, 0.98, math.prod(shape), dtype=torch.float64).view(shape)
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = normal(1, Stream.NOISE, torch.arange(4), shape[1:], dtype=torch.float64)
    level = record.schedule.level(t)
    draw = Draw(
        level, noise, torch.zeros(4, dtype=torch.bool), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    )
    denoiser = Denoiser(Map(), record)
    losses = Objective(MinSNR())(denoiser, x0, None, draw)

    snr = np.exp(2 * stats.norm.ppf(1 - t.numpy()))
    alpha, sigma = {
        "vp": (np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))),
        "flow": (np.sqrt(snr) / (1 + np.sqrt(snr)), 1 / (1 + np.sqrt(snr))),
        "ve": (np.ones(shape), 1 / np.sqrt(snr)),
    }[scaling]
    x = alpha * x0.numpy() + sigma * noise.numpy()
    scaled = x / np.sqrt(sigma**2 + alpha**2 * 0.36) if prediction_type == "edm" else x
    F = np.cos(scaled) + (1000 * t.numpy() - 1) / 1000 + 0.1
    predicted = guess(prediction_type, F, x, alpha, sigma, 0.6)
    expected = (np.minimum(snr, 5) * (predicted - x0.numpy()) ** 2).mean((1, 2, 3)) * np.array(
        [1, 2, 0.5, 3]
    )
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-8)

    prediction = denoiser(torch.from_numpy(x), level)
    np.testing.assert_allclose(prediction.x0, predicted, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(prediction.at(level), x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        (
            Objective(MSE("v_prediction")),
            Process(Cauchy(), "epsilon"),
            "MSE.* is infinite at λ = -.* for epsilon, and Cauchy",
        ),
        (Objective(EDM()), Process(Beta(0.2), "sample"), "EDM.* is infinite at λ = 2.* for sample"),
        (
            Objective(),
            Process(Cauchy(scaling="ve")),
            r"Cauchy.* draws levels where the ve scaling has σ = inf: use Trunc",
        ),
        (
            Objective(corrected=True),
            Process(Discrete()),
            "corrected divides by the density of λ, which .* Truncated",
        ),
    ],
    ids=str,
)
def test_a_process_with_an_infinite_loss_is_refused_with_the_remedy(objective, record, message):
    with pytest.raises(ValueError, match=message) as caught:
        objective.check(record)
    assert "\n" not in str(caught.value)
    bounded = Truncated(record.schedule, -9.0, 9.0)
    objective.check(replace(record, schedule=bounded))


@pytest.mark.parametrize(
    "schedule",
    [Cosine(), Flow(), Laplace(), Normal(), Cauchy(), Rho(), Sigmoid(), Mode(), Beta()],
    ids=repr,
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "edm"])
def test_weights_that_are_finite_at_the_drawn_levels_are_accepted(schedule, prediction_type):
    Objective(MinSNR(), corrected=True).check(Process(schedule, prediction_type))


def test_an_infinite_weight_at_the_cleanest_level_of_a_table_is_refused():
    @dataclass(frozen=True)
    class Clean(Discrete):
        """A table whose first level is clean data."""

        def _logsnr(self, t: Tensor) -> Tensor:
            return super()._logsnr(t).masked_fill(t <= 1 / self.steps, math.inf)

    record = Process(Clean(), "v_prediction")
    with pytest.raises(ValueError, match=r"ELBO.* is infinite at λ = inf for sample"):
        Objective(ELBO()).check(replace(record, prediction="sample"))
    Objective(ELBO()).check(record)


def test_resampler_and_uncertainty_together_are_refused():
    with pytest.raises(
        ValueError, match=r"resampler and uncertainty both even out the losses .* choose one"
    ):
        Objective(resampler=SecondMoment(), uncertainty=Uncertainty())
