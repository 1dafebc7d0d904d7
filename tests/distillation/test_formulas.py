"""The losses of few-step networks equal the papers' formulas, written independently."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser, extract_tensor
from diffcore.core.process import Process, TimeConditioning
from diffcore.distillation import (
    Consistency,
    ContinuousConsistency,
    KnotIntervals,
    MeanFlow,
    OracleTeacher,
    Shortcut,
    ShrinkingIntervals,
)
from diffcore.distillation.derivative import Derivative
from diffcore.distillation.few_step import NoisySample, RandomState
from diffcore.distillation.flow_map import FlowMap
from diffcore.networks import Perceptron, TwoTimes
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.losses import RootMeanSquareHuber, SquaredError
from diffcore.objectives.networks import Networks
from diffcore.objectives.weighting import MSE
from diffcore.schedules import Cosine, Flow, Karras, Normal, Trailing
from tests.helpers.oracles import SCALINGS, gaussian, mixture, process, unet
from tests.networks.test_networks import randomised

COUNT = 16
TIME = TimeConditioning("blend", 10.0)
X0 = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def record(estimate, schedule=None, prediction="flow_prediction", **fields):
    return Process(
        schedule or Flow(),
        prediction,
        TIME,
        shape=(2,),
        sigma_data=fields.pop("sigma_data", 1.0),
        estimate=estimate,
        **fields,
    )


def student(process, two_times=False, classes=0):
    torch.manual_seed(3)
    inner = Perceptron([2], 16, 2, classes)
    network = randomised(TwoTimes(lambda: inner) if two_times else inner).double()
    return Denoiser(network, process)


class Drop(nn.Module):
    """Dropout of x, before a network with a time."""

    def __init__(self, network, p):
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(p)

    def forward(self, x, time, **arguments):
        return self.network(self.dropout(x), time, **arguments)


def drawn(objective, process, step=0):
    draw = objective.draw(process, SampleKey(0, step, torch.arange(COUNT), COUNT))
    return draw._replace(noise=draw.noise.double())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_improved_consistency_training_in_the_variables_of_its_paper(scaling):
    """x = x_0 + σ ε, pseudo-Huber with c = 0.00054 √d, weight 1/(σ_{i+1} - σ_i)."""
    schedule = Normal(2.2, 4.0, scaling=scaling)  # ln σ ~ N(-1.1, 2²)
    process = record("consistency", schedule)
    objective = Consistency(intervals=KnotIntervals(first=10, last=40, period=5))
    denoiser, draw = student(process), drawn(objective, process, step=7)
    losses = objective(denoiser, X0, None, draw)
    noisy, clean = draw.level.ratio, draw.level.end.ratio
    ratios = [k.ratio for k in Karras().knots(schedule, 20)]  # 10 · 2^⌊7/5⌋
    knots = torch.tensor(ratios, dtype=torch.float64)
    at = (knots - noisy).abs().argmin(1)
    torch.testing.assert_close(noisy[:, 0], knots[at])
    torch.testing.assert_close(clean[:, 0], knots[at + 1])

    def f(y, u):  # y = x/α at σ/α
        level = schedule.at(-2 * u.log())
        return denoiser(y * level.alpha, level).x0

    with torch.no_grad():
        student_x0 = f(X0 + noisy * draw.noise, noisy)
        safe = clean.clamp(min=1e-3)
        target = torch.where(clean == 0, X0, f(X0 + safe * draw.noise, safe))
    c = 0.00054 * math.sqrt(2)
    distance = ((student_x0 - target).square().sum(1) + c**2).sqrt() - c
    expected = distance / (noisy - clean)[:, 0]
    torch.testing.assert_close(losses * math.sqrt(2), expected, rtol=1e-6, atol=1e-9)


def test_the_probability_of_an_interval_is_that_of_the_log_normal_levels():
    """erf((ln σ_{i+1} - P)/(√2 S)) - erf((ln σ_i - P)/(√2 S)), normalised over the intervals."""
    schedule = Normal.edm(-1.1, 2.0)
    intervals = KnotIntervals(first=8, last=8)
    times = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).view(-1, 1)
    level, _ = intervals.levels(schedule, times, 0)
    knots = Karras().knots(schedule, 8)
    logs = torch.tensor([k.ratio for k in knots], dtype=torch.float64).log()
    cdf = torch.erf((logs + 1.1) / (math.sqrt(2) * 2.0))
    expected = (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1])
    found = torch.stack([(level.logsnr == k.logsnr).double().mean() for k in knots[:-1]])
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)


def test_the_number_of_intervals_doubles_up_to_the_last_one():
    intervals = KnotIntervals(first=10, last=1280, period=100)
    counts = [intervals.count(step) for step in (0, 99, 100, 250, 699, 700, 10**9)]
    assert counts == [10, 10, 20, 40, 640, 1280, 1280]


def test_easy_consistency_tuning_maps_levels_as_its_paper():
    schedule = Normal.edm(-1.1, 2.0)
    times = torch.linspace(0.02, 0.98, 9, dtype=torch.float64).view(-1, 1)
    for step, stage in ((0, 0), (25, 2), (1000, 3)):
        intervals = ShrinkingIntervals(q=2.0, period=10, stages=4)
        level, end = intervals.levels(schedule, times, step)
        u = level.ratio
        r = (u * (1 - (1 + 8 * torch.sigmoid(-u)) / 2.0 ** (stage + 1))).clamp(min=0)
        torch.testing.assert_close(end.ratio, r, rtol=1e-9, atol=1e-12)
        weight = intervals.weight(level, end, 0.5)
        torch.testing.assert_close(weight, (u**2 + 0.25) / (u * 0.5) ** 2)


def test_the_steps_of_a_latent_consistency_model_are_those_of_its_table():
    intervals = KnotIntervals(Trailing(), first=50, last=50, weighting=MSE("sample"))
    times = (torch.arange(1, 1001, dtype=torch.float64) / 1000).view(-1, 1)
    level, end = intervals.levels(Cosine(), times, 0)
    torch.testing.assert_close(level.t - end.t, torch.full_like(times, 0.02))
    torch.testing.assert_close(level.t, (times * 50 - 1e-9).ceil() / 50)
    assert (intervals.weight(level, end, 0.5) == 1).all()


def test_the_huber_loss_of_a_sample_is_that_of_its_norm():
    error = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d, c = 15, 0.1
    expected = ((error.square().flatten(1).sum(1) + c**2 * d).sqrt() - c * d**0.5) / d**0.5
    torch.testing.assert_close(RootMeanSquareHuber(c)(error).flatten(1).mean(1), expected)
    zero = torch.zeros(2, 3, requires_grad=True)
    RootMeanSquareHuber(0.0)(zero).sum().backward()
    assert not zero.grad.any()
    with pytest.raises(ValueError, match=r"scale is -1"):
        RootMeanSquareHuber(-1.0)


@pytest.mark.parametrize("prediction", ("flow_prediction", "v_prediction", "edm"))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_continuous_loss_in_the_variables_of_trigflow(scaling, prediction):
    """By differences of f in float64: g = cos θ df/dθ along x' = cos θ x_0 + sin θ s ε."""
    s = 0.7
    process = record("consistency", Normal(1.0, 1.5, scaling=scaling), prediction, sigma_data=s)
    objective = ContinuousConsistency(warmup=0)
    denoiser, draw = student(process), drawn(objective, process)
    angle = torch.atan(draw.level.ratio / s)

    def f(angle):
        level = process.schedule.at(-2 * (s * angle.tan()).log())
        x = level.alpha * X0 + level.sigma * draw.noise
        x0, eps = denoiser(x, level)
        return x0, (angle.cos() * s * eps - angle.sin() * x0) / s

    h = 1e-5
    with torch.no_grad():
        slope = (f(angle + h)[0] - f(angle - h)[0]) / (2 * h)
    g = angle.cos() * slope
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    output = f(angle)[1]
    losses = (output - output.detach() - g).square().mean(1)
    found = objective(denoiser, X0, None, draw)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-8)
    parameters = list(denoiser.parameters())
    own, expected = (
        torch.autograd.grad(value.mean(), parameters, allow_unused=True)
        for value in (found, losses)
    )
    for a, b in zip(own, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_tangent_warms_up_and_a_teacher_replaces_the_data():
    process = record("consistency", Cosine())
    oracle = mixture(replace(process, estimate="posterior_mean"))
    denoiser = student(process)
    full, half, first = (
        ContinuousConsistency(warmup=w, normalisation=math.inf) for w in (0, 20, 10**9)
    )
    losses = [o(denoiser, X0, None, drawn(o, process, step=10)) for o in (full, half, first)]
    assert not torch.allclose(losses[0], losses[1])
    tangents = []
    for objective in (full, half, first):
        draw = drawn(objective, process, step=10)
        sample = NoisySample(denoiser, None, X0, draw.noise, draw, None)
        tangents.append(objective.tangent(sample, torch.zeros_like(X0)).detach())
    torch.testing.assert_close(tangents[1], (tangents[0] + tangents[2]) / 2, atol=1e-7, rtol=1e-6)
    taught = replace(full, teacher=OracleTeacher(oracle))
    networks = taught.networks(denoiser, torch.device("cpu"), lambda network: network)
    other = taught(denoiser, X0, None, drawn(full, process), networks=networks)
    assert not torch.allclose(other, full(denoiser, X0, None, drawn(full, process)))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_loss_of_mean_flow_in_the_variables_of_its_paper(scaling):
    """z = (1-a) x_0 + a ε, v = ε - x_0, du/da by differences in float64."""
    process = record("mean_velocity", Normal(1.0, 1.5, scaling=scaling))
    objective = MeanFlow(share=0.6, power=0.75, floor=1e-3)
    denoiser, draw = student(process, two_times=True), drawn(objective, process)
    a, r = draw.level.blend, draw.level.end.blend
    assert (r <= a).all()
    assert 0 < float((a == r).double().mean()) < 1

    def u(z, a):
        level = replace(process.schedule.at_blend(a), end=process.schedule.at_blend(r))
        x0, eps = denoiser(z * (level.alpha + level.sigma), level)
        return eps - x0

    v, h = draw.noise - X0, 1e-6
    z = (1 - a) * X0 + a * draw.noise
    with torch.no_grad():
        slope = (u(z + h * v, a + h) - u(z - h * v, a - h)) / (2 * h)
        square = (u(z, a) - (v - (a - r) * slope)).square().sum(1)
    expected = square / (square + 1e-3) ** 0.75
    torch.testing.assert_close(objective(denoiser, X0, None, draw), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction", ("flow_prediction", "v_prediction", "edm", "epsilon"))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_forward_mode_equals_the_difference_to_a_thousandth(scaling, prediction):
    process = record("mean_velocity", Normal(1.0, 1.5, scaling=scaling), prediction)
    denoiser = student(process, two_times=True)
    draw = drawn(MeanFlow(share=1.0), process)
    level = draw.level
    x, velocity = level.alpha * X0 + level.sigma * draw.noise, draw.noise - X0

    def evaluate(x, level):
        x0, eps = denoiser(x, level)
        return eps - x0

    exact = Derivative()(evaluate, x, level, velocity)
    difference = Derivative("difference", 0.001)(evaluate, x, level, velocity)
    assert (exact - difference).norm() < 1e-3 * exact.norm()


def test_guidance_is_mixed_into_the_velocity_of_samples_that_keep_their_label():
    process = record("mean_velocity", classes=3, dropout=0.5)
    denoiser = student(process, two_times=True, classes=3)
    plain, guided = MeanFlow(share=0.5), MeanFlow(share=0.5, omega=1.5, kappa=0.4)
    labels = torch.arange(COUNT) % 3
    draw = drawn(guided, process)
    dropped = draw.dropout_mask
    given = torch.where(dropped, 3, labels)
    sample = NoisySample(denoiser, None, X0, draw.noise, draw, given, labels)
    at = replace(draw.level, end=None)

    def u(labels):
        x0, eps = denoiser(sample.x, at, labels)
        return eps - x0

    v = draw.noise - X0
    with torch.no_grad():
        mixed = 1.5 * v + 0.4 * u(labels) + (1 - 1.9) * u(torch.full_like(labels, 3))
        expected = torch.where(dropped[:, None], v, mixed)
        torch.testing.assert_close(guided._velocity(sample), expected)
        torch.testing.assert_close(plain._velocity(sample), v)


def changed(network):
    """A copy with smaller weights."""
    network = copy.deepcopy(network)
    for value in network.parameters():
        value.data *= 0.7
    return network


def with_dropout(denoiser, p=0.5):
    """The same network in training mode, behind dropout of x."""
    return Denoiser(Drop(denoiser.network, p), denoiser.process).train()


@pytest.mark.parametrize("target", ("own", "average"))
def test_a_long_step_of_a_shortcut_is_the_mean_of_its_halves(target):
    """With an average: of other weights, which have no dropout while the network has."""
    process = record("mean_velocity", Flow())
    objective = Shortcut(steps=8, share=0.75, target=target)
    denoiser, draw = student(process, two_times=True), drawn(objective, process)
    averaged, trained = denoiser, denoiser
    if target == "average":
        averaged = Denoiser(changed(denoiser.network), process).eval()
        trained = with_dropout(denoiser)
        averaged = Denoiser(Drop(averaged.network, 0.5), process).eval()
    a, b = draw.level.blend, draw.level.end.blend
    is_long = (a > b)[:, 0]
    assert is_long.any()
    assert not is_long.all()
    d = (a - b)[is_long]
    assert set((1 / d).round().flatten().long().tolist()) <= {1, 2, 4}
    torch.testing.assert_close((a[is_long] / d).round(), a[is_long] / d)

    def u(z, a, r, network=averaged):
        level = replace(process.schedule.at_blend(a), end=process.schedule.at_blend(r))
        x0, eps = network(z, level)
        return eps - x0

    z, m = (1 - a) * X0 + a * draw.noise, (a + b) / 2
    is_short = a - b < 0.3  # halves of 1/8
    with torch.no_grad():
        first = u(z, a, torch.where(is_short, a, m))
        second = u(z - (a - m) * first, m, torch.where(is_short, m, b))
        goal = torch.where(is_long[:, None], (first + second) / 2, draw.noise - X0)
        torch.manual_seed(5)
        expected = (u(z, a, b, trained) - goal).square().mean(1)
    torch.manual_seed(5)
    losses = objective(trained, X0, None, draw, networks=Networks(averaged=averaged))
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    assert all(p.grad is None for p in averaged.parameters()) == (target == "average")


def test_an_averaged_target_of_consistency_has_other_weights_and_the_dropout_of_the_student():
    process = record("consistency")
    intervals = KnotIntervals(first=8, last=8, weighting=MSE("sample"))
    objective = Consistency(intervals=intervals, loss=SquaredError(), target="average")
    inner, draw = student(process), drawn(objective, process)
    denoiser, p = with_dropout(inner), 0.5
    other = Drop(changed(inner.network), p)
    averaged = Denoiser(other, process).eval()
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones_like(X0), p)
    level, end = draw.level, draw.level.end
    is_clean = end.sigma == 0
    at = level.schedule.at(torch.where(is_clean, level.logsnr, end.logsnr))
    x, y = (each.alpha * X0 + each.sigma * draw.noise for each in (level, at))
    with torch.no_grad():

        def predicted(network, x, level):
            v = extract_tensor(network(x * mask, 10.0 * level.blend.flatten()))
            return x - level.blend * v

        goal = torch.where(is_clean, X0, predicted(other.network, y, at))
        square = (predicted(inner.network, x, level) - goal).square()
    weight = objective.intervals.weight(level, end, 1.0)
    torch.manual_seed(5)
    losses = objective(denoiser, X0, None, draw, networks=Networks(averaged=averaged))
    torch.testing.assert_close(losses, (weight * square).mean(1), rtol=1e-6, atol=1e-9)
    assert not averaged.training


def test_a_target_has_the_dropout_of_the_student_and_leaves_the_generator_as_it_was():
    x = torch.ones(64)
    random = RandomState(x)
    first = nn.functional.dropout(x, 0.5)
    after = torch.get_rng_state()
    with random.repeated():
        assert torch.equal(nn.functional.dropout(x, 0.5), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_with_the_same_dropout_short_intervals_have_a_short_distance():
    """With another dropout in the target the distance would not fall with the intervals."""
    process = record("consistency")
    torch.manual_seed(0)
    network = randomised(Drop(Perceptron([2], 16, 2), 0.5)).double()
    denoiser = Denoiser(network, process).train()
    errors = []
    for count in (64, 4096):
        intervals = KnotIntervals(first=count, last=count, weighting=MSE("sample"))
        objective = Consistency(intervals=intervals, loss=SquaredError())
        torch.manual_seed(1)
        losses = objective(denoiser, X0, None, drawn(objective, process))
        errors.append(losses.detach().mean())
    assert errors[1] < errors[0] / 500


def test_an_exact_flow_map_of_a_gaussian_equals_its_closed_form():
    """x_s = α_s m + √(α_s² C + σ_s²) (α_t² C + σ_t²)^-½ (x_t - α_t m)."""
    variance = torch.diag(torch.tensor([0.5, 1.5], dtype=torch.float64))
    oracle = gaussian([0.3, -0.5], variance, process(Cosine(), classes=0))
    schedule, mean = oracle.process.schedule, torch.tensor([0.3, -0.5], dtype=torch.float64)
    t, s = schedule.at(-2.0), schedule.at(1.0)
    scale = [(v.alpha**2 * variance.diagonal() + v.sigma**2).sqrt() for v in (t, s)]
    expected = s.alpha * mean + scale[1] / scale[0] * (X0 - t.alpha * mean)
    found = FlowMap(oracle, "mean_velocity")(X0, replace(t, end=s)).at(s)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    clean = mean + variance.diagonal().sqrt() / scale[0] * (X0 - t.alpha * mean)
    x0, eps = FlowMap(oracle, "consistency")(X0, t)
    torch.testing.assert_close(x0, clean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(t.alpha * x0 + t.sigma * eps, X0)


def test_a_unet_with_attention_and_group_norms_has_a_derivative_in_forward_mode():
    process = Process(Flow(), "flow_prediction", TimeConditioning("blend", 5.0), shape=(1, 8, 8))
    network = unet().double()
    x, v = (
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k in range(2)
    )
    denoiser = Denoiser(network, replace(process, classes=2, dropout=0.1))
    level = process.schedule.level(torch.tensor([0.2, 0.4, 0.6, 0.8]).view(-1, 1, 1, 1).double())

    def evaluate(x, level):
        return denoiser.output(x, level, torch.tensor([0, 1, 2, 0]))

    exact = Derivative()(evaluate, x, level, v)
    difference = Derivative("difference", 0.001)(evaluate, x, level, v)
    assert (exact - difference).norm() < 1e-3 * exact.norm()


class Cube(torch.autograd.Function):
    """A function with a derivative in backward mode alone."""

    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_network_without_forward_mode_is_refused_with_the_remedy():
    level = Flow().level(torch.full((2, 1), 0.5, dtype=torch.float64))
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"set the method of the derivative to difference"):
        Derivative()(lambda x, level: Cube.apply(x), x, level, x)
    found = Derivative("difference")(lambda x, level: Cube.apply(x), x, level, x)
    torch.testing.assert_close(found, 3 * x**2 * 0.25, rtol=1e-3, atol=1e-3)
