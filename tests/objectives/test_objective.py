"""The training loss: the draws of levels, noise and dropout, and w(λ) |x̂_0 - x_0|²."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

import diffcore.objectives.objective
from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import predict, target
from diffcore.core.process import Process, TimeConditioning
from diffcore.core.random import Stream, normal
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE, MinSNR, Weight
from diffcore.schedules import Cosine, Discrete, Flow, Laplace, Normal, ZeroTerminalSNR
from tests.helpers.oracles import PREDICTION_TYPES

SEED, STEP, BATCH = 7, 3, 24
KEY = SampleKey(SEED, STEP, torch.arange(BATCH), BATCH)


def at(key: SampleKey, rows) -> SampleKey:
    """The key of the samples of a rank or of a micro-batch."""
    return SampleKey(key.seed, key.step, torch.as_tensor(rows), key.batch)


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_stratified_times_are_even_over_the_global_batch(step):
    """The sorted times have the spacing 1/B, and the smallest is at most 1/B.

    The tolerance requires float64: the quotient index / batch has an error of 3e-8 in float32.
    """
    times = Objective().times(SampleKey(SEED, step, torch.arange(BATCH), BATCH)).sort().values
    comb = times[0] + torch.arange(BATCH, dtype=torch.float64) / BATCH
    torch.testing.assert_close(times, comb, rtol=0, atol=1e-15)
    assert 0 < times[0] <= 1 / BATCH


@pytest.mark.parametrize("levels", ["stratified", "independent"])
def test_the_time_of_one_sample_is_uniform_over_steps(levels):
    objective = Objective(levels=levels)
    pairs = torch.stack(
        [objective.times(SampleKey(SEED, step, torch.tensor([0, 5]), 8)) for step in range(1500)]
    )
    for times in pairs.T.numpy():
        assert stats.kstest(times, "uniform").pvalue > 0.01
        assert abs(np.corrcoef(times[1:], times[:-1])[0, 1]) < 4 / math.sqrt(1500)


def test_independent_times_are_uniform_and_uncorrelated_within_the_batch():
    times = (
        Objective(levels="independent").times(SampleKey(SEED, 0, torch.arange(5000), 5000)).numpy()
    )
    assert stats.kstest(times, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(times[1:], times[:-1])[0, 1]) < 4 / math.sqrt(5000)


@pytest.mark.parametrize("levels", ["stratified", "independent"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_any_split_of_the_batch_draws_the_same_samples(levels, ranks, accumulation):
    """Bit for bit, up to the last bit of vectorised functions, which depends on alignment."""
    process = Process(classes=3, dropout=0.5, shape=(1, 2, 3))
    whole = Objective(levels=levels).draw(process, KEY)
    size = BATCH // (ranks * accumulation)
    for rows in torch.randperm(BATCH, generator=torch.Generator().manual_seed(0)).split(size):
        torch.manual_seed(int(rows[0]))  # the global generator has no effect
        part = Objective(levels=levels).draw(process, at(KEY, rows))
        assert torch.equal(part.level.t, whole.level.t[rows])
        for name in ("logsnr", "alpha", "sigma"):
            value = getattr(whole.level, name)[rows]
            torch.testing.assert_close(getattr(part.level, name), value, rtol=1e-14, atol=1e-14)
        assert torch.equal(part.noise, whole.noise[rows])
        assert torch.equal(part.dropout_mask, whole.dropout_mask[rows])


def test_a_draw_has_the_documented_key_and_differs_between_steps_and_seeds():
    process = Process(shape=(1, 2, 3))
    draw = Objective().draw(process, KEY)
    assert torch.equal(
        draw.noise, normal(SEED, Stream.NOISE, STEP * BATCH + torch.arange(BATCH), (1, 2, 3))
    )
    assert draw.level.alpha.shape == (BATCH, 1, 1, 1)
    for other in (
        SampleKey(SEED + 2**32, STEP, torch.arange(BATCH), BATCH),
        SampleKey(SEED, STEP + 1, torch.arange(BATCH), BATCH),
    ):
        another = Objective().draw(process, other)
        assert not torch.isin(another.noise, draw.noise).any()
        assert not torch.isin(another.level.t, draw.level.t).any()


def test_levels_are_those_of_the_schedule_at_the_times():
    times = Objective().times(KEY)
    level = Objective().draw(Process(schedule=Laplace(1.0)), KEY).level
    assert torch.equal(level.logsnr.flatten(), Laplace(1.0).logsnr(times))
    table = (
        Objective()
        .draw(Process(schedule=Discrete(steps=50), time=TimeConditioning(scale=50.0)), KEY)
        .level
    )
    assert torch.equal(table.t.flatten(), (times * 50).ceil() / 50)


@pytest.mark.parametrize("levels", ["stratified", "independent"])
@pytest.mark.parametrize("u", [0.0, 2.0**-53, 1 - 2.0**-53])
def test_times_are_inside_the_open_interval(levels, u, monkeypatch):
    monkeypatch.setattr(
        diffcore.objectives.objective,
        "uniform",
        lambda *args: torch.full((BATCH, 1), u, dtype=torch.float64),
    )
    times = Objective(levels=levels).times(KEY)
    assert ((times > 0) & (times < 1)).all()
    assert Cosine().logsnr(times).isfinite().all()


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="levels is 'even', expected stratified or independent"):
        Objective(levels="even")


@dataclass(frozen=True)
class Inverse(Weight):
    """w = 1/SNR, infinite at pure noise for every target."""

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return -logsnr


ZERO = ZeroTerminalSNR(Discrete())


@pytest.mark.parametrize(
    "prediction_type", [name for name in PREDICTION_TYPES if name != "epsilon"]
)
def test_an_infinite_weight_at_a_level_that_the_table_draws_is_refused(prediction_type):
    process = Process(schedule=ZERO, prediction=prediction_type)
    with pytest.raises(
        ValueError,
        match=r"Inverse.* is infinite at λ = -inf for .*draws that level: use a bounded weig",
    ):
        Objective(Inverse()).check(process)
    for weight in (MinSNR(), MSE("epsilon"), MSE("v_prediction")):
        Objective(weight).check(process)


@pytest.mark.parametrize("schedule", [Discrete(), Cosine()], ids=repr)
def test_an_infinite_weight_at_a_level_that_is_never_drawn_is_accepted(schedule):
    Objective(Inverse()).check(Process(schedule=schedule, prediction="v_prediction"))


def test_weights_use_the_levels_of_the_transformed_schedule():
    """Min-SNR of the last table entry on v: 0 with zero terminal SNR, else SNR/(SNR+1)."""
    last = torch.tensor([1.0], dtype=torch.float64)
    snr = Discrete().level(1.0).ratio ** -2
    assert MinSNR().target_weight("v_prediction", ZERO.logsnr(last), 0.5).item() == 0
    assert MinSNR().target_weight(
        "v_prediction", Discrete().logsnr(last), 0.5
    ).item() == pytest.approx(snr / (snr + 1), rel=1e-9)


@pytest.mark.parametrize("levels", ["stratified", "independent"])
def test_dropout_is_per_sample_at_its_rate_and_independent(levels):
    n, p = 20_000, 0.15
    process = Process(classes=10, dropout=p, shape=(1,))
    keys = [SampleKey(SEED, step, torch.arange(200), 200) for step in range(n // 200)]
    steps = [Objective(levels=levels).draw(process, key) for key in keys]
    dropped = torch.cat([draw.dropout_mask for draw in steps]).double().numpy()
    assert dropped.mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    levels = torch.cat([draw.level.t.flatten() for draw in steps]).numpy()
    noise = torch.cat([draw.noise.flatten() for draw in steps]).numpy()
    for other in (np.roll(dropped, 1), np.roll(dropped, 200), levels, noise, noise**2):
        assert abs(np.corrcoef(dropped, other)[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_0_and_1_is_exact(p):
    process = Process(classes=10, dropout=p, shape=(1,))
    assert (
        Objective().draw(process, SampleKey(SEED, 0, torch.arange(2000), 2000)).dropout_mask
        == bool(p)
    ).all()


class Labelled(nn.Module):
    """A network that adds an embedding of the label to x and records its inputs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, 1)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        self.x, self.time, self.labels = x, time, class_labels
        return x + self.embedding(class_labels)[:, :, None, None]


def test_the_null_label_replaces_dropped_labels_and_gets_the_gradient():
    process = Process(classes=4, dropout=0.5, shape=(1, 2, 2))
    network = Labelled(4)
    labels = torch.arange(BATCH) % 4
    draw = Objective().draw(process, KEY)
    assert 0 < draw.dropout_mask.sum() < BATCH
    Objective()(
        Denoiser(network, process), torch.zeros(BATCH, 1, 2, 2), labels, draw
    ).sum().backward()
    assert torch.equal(network.labels, torch.where(draw.dropout_mask, 4, labels))
    assert torch.equal(labels, torch.arange(BATCH) % 4)  # the caller's labels are untouched
    used = set(labels[~draw.dropout_mask].tolist()) | {4}
    assert network.embedding.weight.grad.flatten().nonzero().flatten().tolist() == sorted(used)


class Affine(nn.Module):
    """A network in closed form: cos(x) + time / 1000 + 0.1."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.cos() + time.view(-1, 1, 1, 1) / 1000 + 0.1


WEIGHTS = {  # on the x_0 error
    MSE("v_prediction"): lambda snr: snr + 1,
    MSE("epsilon"): lambda snr: snr,
    MinSNR(): lambda snr: np.minimum(snr, 5),
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
@pytest.mark.parametrize("schedule", [Normal(), Flow(), Normal(scaling="ve")], ids=repr)
def test_the_loss_is_the_weighted_squared_x0_error(prediction_type, weight, schedule):
    """The reference uses numpy in float64; a few float32 ulp of x over a small error leave 1e-4."""
    process = Process(
        schedule=schedule, prediction=prediction_type, shape=(2, 3, 2), sigma_data=0.6
    )
    x0 = torch.randn(BATCH, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    draw = Objective(weight).draw(process, KEY)
    losses = Objective(weight)(Denoiser(Affine(), process), x0, None, draw)

    t, logsnr = draw.level.t.numpy(), draw.level.logsnr.numpy()
    snr = np.exp(logsnr)
    alpha, sigma = {
        "vp": (np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))),
        "flow": (np.sqrt(snr) / (1 + np.sqrt(snr)), 1 / (1 + np.sqrt(snr))),
        "ve": (1, 1 / np.sqrt(snr)),
    }[schedule.scaling]
    x0, eps = x0.double().numpy(), draw.noise.double().numpy()
    x, s = alpha * x0 + sigma * eps, 0.6
    norm, scale = np.sqrt(alpha**2 + sigma**2), np.sqrt(sigma**2 + alpha**2 * s**2)
    F = np.cos(x / scale if prediction_type == "edm" else x) + (1000 * t - 1) / 1000 + 0.1
    guess = {
        "epsilon": (x - sigma * F) / alpha,
        "sample": F,
        "v_prediction": (alpha * x / norm - sigma * F) / norm,
        "flow_prediction": (x - sigma * F) / (alpha + sigma),
        "edm": alpha * s**2 / scale**2 * x + sigma * s / scale * F,
    }[prediction_type]
    expected = (WEIGHTS[weight](snr) * (guess - x0) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)


class Exact(nn.Module):
    """The exact network for data that is a single point."""

    def __init__(self, process: Process, point: Tensor, level) -> None:
        super().__init__()
        self.process, self.point, self.level = process, point, level

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        process, level = self.process, self.level
        if process.prediction == "edm":
            x = x * (level.sigma**2 + level.alpha**2 * process.sigma_data**2) ** 0.5
        eps = (x - level.alpha * self.point) / level.sigma
        return target(process.prediction, self.point.expand_as(x), eps, level, process.sigma_data)


# The loss of a float64 network is computed in float64: rounding to float32 would leave 1e-8.
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_an_exact_network_of_a_single_point_has_no_loss_in_float64(prediction_type):
    process = Process(schedule=Laplace(), prediction=prediction_type, shape=(1, 2, 2))
    point = torch.tensor([[0.3, -0.7], [0.9, 0.1]], dtype=torch.float64)[None]
    draw = Objective().draw(process, KEY)
    network = Exact(process, point, draw.level)
    losses = Objective(MSE(prediction_type))(
        Denoiser(network, process), point.expand(BATCH, 1, 2, 2), None, draw
    )
    assert losses.max() < 1e-26  # squares of 1e-13: 1e-16 / σ at the cleanest level drawn


class Posterior(nn.Module):
    """E[F | x] for data N(m, s² I), from the conditional mean of a Gaussian."""

    mean, std = 0.3, 0.8

    def __init__(self, process: Process, level) -> None:
        super().__init__()
        self.process, self.level = process, level

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self.level.alpha, self.level.sigma
        z = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        x0, eps = self.mean + alpha * self.std**2 * z, sigma * z
        return target(self.process.prediction, x0, eps, self.level, self.process.sigma_data)


@pytest.mark.parametrize("levels", ["stratified", "independent"])
@pytest.mark.parametrize(
    ("schedule", "prediction_type", "weight", "w"),
    [
        (Laplace(), "epsilon", MSE("epsilon"), np.exp),
        (Cosine(), "v_prediction", MinSNR(), lambda logsnr: np.minimum(np.exp(logsnr), 5)),
        (Flow(), "flow_prediction", MSE("sample"), lambda logsnr: 1 + 0 * logsnr),
    ],
    ids=["Laplace epsilon", "Cosine v", "Flow"],
)
def test_the_expected_loss_is_the_integral_of_weight_times_density(
    schedule, prediction_type, weight, w, levels
):
    """The exact network has the error s²/(1 + s² SNR), so the loss is ∫ w p s²/(1 + s² SNR) dλ."""
    n, s = 2000, Posterior.std
    process = Process(schedule=schedule, prediction=prediction_type, shape=(1, 4, 4))
    objective = Objective(weight, levels)
    draw = objective.draw(process, SampleKey(1, 0, torch.arange(n), n))
    x0 = Posterior.mean + s * torch.randn(
        n, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    losses = objective(Denoiser(Posterior(process, draw.level), process), x0, None, draw)
    law = {
        Laplace(): stats.laplace(0, 0.5),
        Cosine(): stats.hypsecant(scale=2),
        Flow(): stats.logistic(scale=2),
    }
    expected = integrate.quad(
        lambda v: w(v) * law[schedule].pdf(v) * s**2 / (1 + s**2 * np.exp(v)), -80, 80, limit=400
    )
    assert losses.mean().item() == pytest.approx(
        expected[0], abs=4 * losses.std().item() / math.sqrt(n)
    )


# In the dtype of the images, bfloat16, index 749 would be rounded to 748 or 752.
def test_half_precision_images_do_not_round_the_time_conditioning():
    process = Process(schedule=Discrete(), classes=2, shape=(1, 2, 2))
    network = Labelled(2)
    draw = Objective().draw(process, KEY)
    Objective()(
        Denoiser(network, process),
        torch.zeros(BATCH, 1, 2, 2).bfloat16(),
        torch.zeros(BATCH).long(),
        draw,
    )
    indices = 1000 * draw.level.t.flatten() - 1
    torch.testing.assert_close(network.time.double(), indices, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradients_by_the_implied_x0_agree_through_the_whole_objective(prediction_type):
    """∂L/∂x̂_0 does not depend on the prediction type, up to 1e-4 of a float32 network."""
    gradients = []
    x0 = torch.randn(BATCH, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for name in (prediction_type, "sample"):
        process = Process(schedule=Laplace(), prediction=name, shape=(1, 2, 2))
        draw = Objective().draw(process, KEY)
        level = draw.level.to(x0)
        x = level.alpha * x0 + level.sigma * draw.noise
        guess = x0 + 0.5 * x0.sin() + 0.2
        raw = target(
            name, guess, (x - level.alpha * guess) / level.sigma, level, 0.5
        ).requires_grad_()
        network = nn.Identity()
        network.forward = lambda x, time, raw=raw: raw
        losses = Objective(MinSNR())(Denoiser(network, process), x0, None, draw)
        (by_raw,) = torch.autograd.grad(losses.sum(), raw)
        (x0_by_raw,) = torch.autograd.grad(predict(name, raw, x, level, 0.5).x0.sum(), raw)
        gradients.append(by_raw / x0_by_raw)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_objectives_with_equal_fields_are_equal():
    assert Objective(MinSNR(3.0)) == replace(Objective(), weight=MinSNR(3.0))
    assert repr(Objective()).startswith(
        "Objective(weight=MSE(target='v_prediction'), levels='stratified', "
    )
