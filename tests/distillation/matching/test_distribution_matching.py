"""Distribution matching: its gradient is that of the divergence of noised Gaussians."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.distillation import (
    Discriminator,
    DistributionMatching,
    Divergence,
    FeatureDiscriminator,
    NetworkDiscriminator,
    NetworkTraining,
    OracleTeacher,
    ScoreIdentity,
    Student,
)
from diffcore.distillation.matching.discriminator import DISCRIMINATOR
from diffcore.distillation.matching.distribution_matching import FAKE, _WeightedDiscriminator
from diffcore.guidance import CFG
from diffcore.networks import Perceptron
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks, TrainedNetwork
from diffcore.objectives.weighting import MSE
from diffcore.schedules import Cosine, Explicit, Flow, Trailing
from diffcore.schedules.base import alpha_sigma
from tests.helpers.oracles import ExactNetwork, covariance

BATCH = 20_000
PROCESS = Process(Cosine(), prediction="v_prediction", shape=(2,), estimate="consistency")
MEAN, COVARIANCE = torch.tensor([0.5, -0.3]).double(), covariance(0.9, 0.5, 0.6)


class Affine(nn.Module):
    """The student x_0 = b + A z for one step: v = -x_0 at pure noise."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return -(x.double() @ self.a.T + self.b).to(x.dtype)


def gaussian(mean, cov, process=PROCESS):
    record = replace(process, estimate="posterior_mean")
    return GaussianMixture(mean.double()[None], cov.double()[None], process=record)


@dataclass(frozen=True)
class ExactRatio(Discriminator):
    """ln p/q of two known distributions."""

    teacher: GaussianMixture | None = None
    student: GaussianMixture | None = None

    def module(self, backbones, process):
        return nn.Linear(1, 1)

    def logits(self, networks, process, x, level, condition):
        return self.teacher.log_density(x, level) - self.student.log_density(x, level)


A = torch.tensor([[0.7, 0.1], [-0.2, 0.6]]).double()
B = torch.tensor([0.2, 0.1]).double()
EXACT = (torch.linalg.cholesky(COVARIANCE), MEAN)
"""A student whose samples have the teacher's distribution."""


def setup(objective_class=DistributionMatching, a=A, b=B, steps=1, divergence="rkl", **options):
    """Objective, student, and networks with the exact score and ratio of its samples."""
    teacher, own = gaussian(MEAN, COVARIANCE), gaussian(b, a @ a.T)
    ratio = None
    if divergence != "rkl":
        ratio = ExactRatio(teacher=teacher, student=own)
        options["divergence"] = Divergence(divergence, bound=1e6)
    objective = objective_class(
        teacher=OracleTeacher(teacher), student=Student(steps), discriminator=ratio, **options
    )
    student = Denoiser(Affine(a, b), PROCESS)
    record = replace(PROCESS, estimate="posterior_mean")
    trained = {FAKE: TrainedNetwork(ExactNetwork(own, record))}
    if ratio:
        weighted = _WeightedDiscriminator(nn.Linear(1, 1), objective.divergence)
        trained[DISCRIMINATOR] = TrainedNetwork(weighted)
    return objective, student, Networks(OracleTeacher(teacher).denoiser(), trained)


def gradients(objective, student, networks, steps=8):
    """Mean and standard error over steps of the gradient in A and b."""
    found = []
    for step in range(steps):
        key = SampleKey(3, step, torch.arange(BATCH), BATCH)
        draw = objective.draw(PROCESS, key)
        losses = objective(student, torch.zeros(BATCH, 2), None, draw, networks=networks)
        (student.zero_grad(), losses.mean().backward())
        found.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    table = torch.stack(found)
    return table.mean(0), table.std(0) / math.sqrt(steps)


def divergence_gradient(name, time_range, times=200):
    """The gradient of the mean over t of a divergence of noised Gaussians, in closed form."""
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    low, high = time_range
    t = low + (high - low) * (torch.arange(times).double() + 0.5) / times
    alpha, sigma = alpha_sigma(PROCESS.schedule.logsnr(t), "vp")
    eye = torch.eye(2).double()
    p = alpha[:, None, None] ** 2 * COVARIANCE + sigma[:, None, None] ** 2 * eye
    q = alpha[:, None, None] ** 2 * (a @ a.T) + sigma[:, None, None] ** 2 * eye
    d = alpha[:, None] * (b - MEAN)

    def kl(own, other):
        inverse = other.inverse()
        trace = (inverse @ own).diagonal(dim1=1, dim2=2).sum(1)
        square = torch.einsum("ti,tij,tj->t", d, inverse, d)
        return (trace + square - 2 + other.logdet() - own.logdet()) / 2

    value = {"rkl": kl(q, p), "kl": kl(p, q), "jeffreys": kl(p, q) + kl(q, p)}[name].mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, (a, b))])


@pytest.mark.parametrize("name", ["rkl", "kl", "jeffreys"])
def test_the_gradient_is_that_of_the_divergence_of_noised_distributions(name):
    """With w = SNR; the loss is a mean over 2 numbers. h is exact while its running mean is 1."""
    options = {"student_weight": MSE("epsilon"), "normalised": False, "time_range": (0.2, 0.9)}
    objective, student, networks = setup(divergence=name, **options)
    mean, error = gradients(objective, student, networks)
    expected = divergence_gradient(name, objective.time_range) / 2
    assert (expected.abs() > 0.02).sum() >= 4
    assert ((mean - expected).abs() < 5 * error + 2e-3 * expected.abs().max()).all()


@pytest.mark.parametrize("objective_class", [DistributionMatching, ScoreIdentity])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_gradient_is_zero_at_the_teachers_distribution_alone(objective_class, normalised):
    a, b = EXACT
    exact = setup(objective_class, a, b, normalised=normalised)
    assert gradients(*exact, steps=2)[0].abs().max() < 1e-5
    away, error = gradients(*setup(objective_class, normalised=normalised), steps=2)
    assert (away.abs() > 5 * error + 1e-2).any()


@pytest.mark.parametrize("objective_class", [DistributionMatching, ScoreIdentity])
def test_gradient_descent_with_exact_scores_ends_at_the_teachers_distribution(objective_class):
    a, b = A.clone(), B.clone()
    for step in range(60):
        objective, student, networks = setup(objective_class, a, b)
        draw = objective.draw(PROCESS, SampleKey(3, step, torch.arange(500), 500))
        losses = objective(student, torch.zeros(500, 2), None, draw, networks=networks)
        losses.mean().backward()
        a, b = (value.detach() - 0.3 * value.grad for value in student.parameters())
    assert (A @ A.T - COVARIANCE).abs().max() > 0.3
    assert (a @ a.T - COVARIANCE).abs().max() < 0.01
    assert (b - MEAN).abs().max() < 0.01


@pytest.mark.parametrize("name", ["kl", "js", "softened-rkl", "neyman", "hellinger", "jeffreys"])
def test_equal_distributions_have_a_constant_weight(name):
    a, b = EXACT
    objective, student, networks = setup(a=a, b=b, divergence=name)
    assert gradients(objective, student, networks, steps=2)[0].abs().max() < 1e-5
    weight = networks.module(DISCRIMINATOR).mean_weight
    weight.update(weight.take())
    key = SampleKey(3, 0, torch.arange(256), 256)
    draw = objective.draw(PROCESS, key)
    logits = torch.zeros(256)
    torch.testing.assert_close(weight(logits, draw.level.t[:, 0]), torch.ones(256))


def test_score_identity_is_its_formula():
    """Autograd of the formula, written for the affine student with exact denoisers."""
    objective, student, networks = setup(ScoreIdentity, normalised=False, alpha=1.2)
    key = SampleKey(5, 0, torch.arange(64), 64)
    draw = objective.draw(PROCESS, key)
    losses = objective(student, torch.zeros(64, 2), None, draw, networks=networks)
    sample = student(objective.student.start(PROCESS, draw), PROCESS.schedule.level(1.0)).x0
    level = draw.level.to(sample)
    x = level.alpha * sample + level.sigma * draw.noise
    f, g = gaussian(MEAN, COVARIANCE)(x, draw.level).x0, gaussian(B, A @ A.T)(x, draw.level).x0
    expected = (((f - g) * (g - sample)) - 0.2 * (f - g) ** 2).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(value.sum(), student.network.b, retain_graph=True)[0]
        for value in (losses, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_value_and_the_normalisation_are_those_of_the_equation():
    objective, student, networks = setup()
    key = SampleKey(5, 0, torch.arange(64), 64)
    draw = objective.draw(PROCESS, key)
    losses = objective(student, torch.zeros(64, 2), None, draw, networks=networks)
    sample = student(objective.student.start(PROCESS, draw), PROCESS.schedule.level(1.0)).x0
    level = draw.level.to(sample)
    x = (level.alpha * sample + level.sigma * draw.noise).detach()
    f, g = gaussian(MEAN, COVARIANCE)(x, draw.level).x0, gaussian(B, A @ A.T)(x, draw.level).x0
    direction = (g - f) / (sample - f).abs().mean(1, keepdim=True)
    torch.testing.assert_close(losses, direction.square().mean(1) / 2, rtol=1e-3, atol=1e-6)


def test_the_fake_network_is_trained_by_denoising_samples_of_the_student():
    """At the exact score of the student's samples the gradient of its loss is zero."""
    objective, student, networks = setup()
    record = replace(PROCESS, estimate="posterior_mean")
    oracle = gaussian(B, A @ A.T)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.scale = ExactNetwork(oracle, record), nn.Parameter(torch.ones(()))

        def forward(self, x, time):
            return self.scale * self.network(x, time)

    module = Scaled()
    networks = replace(networks, trained={FAKE: TrainedNetwork(module)})
    found = {}
    for scale in (1.0, 1.2):
        module.scale.data.fill_(scale)
        module.zero_grad()
        draw = objective.draw(PROCESS, SampleKey(1, 0, torch.arange(BATCH), BATCH))
        x0 = torch.full((BATCH, 2), torch.nan)  # the data is not used
        losses = objective.network_losses(FAKE, student, x0, None, draw, networks)
        losses.mean().backward()
        found[scale] = abs(float(module.scale.grad))
    assert 10 * found[1.0] < 0.02 < found[1.2]


def test_the_steps_before_the_last_are_simulated_without_gradient():
    objective, student, _ = setup(steps=3)
    calls = []
    student.network.register_forward_hook(
        lambda module, args, output: calls.append((float(args[1][0]), output.requires_grad))
    )
    seen = set()
    for step in range(12):
        calls.clear()
        draw = objective.draw(PROCESS, SampleKey(0, step, torch.arange(4), 4))
        objective.student.sample(student, None, draw)
        assert [has_gradient for _, has_gradient in calls] == [*[False] * (len(calls) - 1), True]
        times = [1000 * t - 1 for t in (1, 2 / 3, 1 / 3)]
        assert [time for time, _ in calls] == pytest.approx(times[: len(calls)], abs=1e-3)
        seen.add(len(calls))
    assert seen == {1, 2, 3}


def test_the_simulation_is_the_sampler_consistency():
    """Both leave a Gaussian after three steps; the moments agree."""
    from diffcore.samplers import Consistency
    from diffcore.sampling.generation import sample

    objective, student, _ = setup(steps=3)
    draws = [
        objective.draw(PROCESS, SampleKey(0, step, torch.arange(BATCH), BATCH)) for step in range(9)
    ]
    draw = next(draw for draw in draws if objective.student.step_index(draw) == 2)
    with torch.no_grad():
        ours = objective.student.sample(student, None, draw)
        theirs = sample(
            student, seeds=range(BATCH), sampler=Consistency(), grid=Trailing(), steps=3
        ).x
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(ours.T.cov(), theirs.T.cov(), rtol=0, atol=0.03)


def test_the_guidance_scale_is_drawn_for_each_sample_by_its_key():
    """A class-conditional teacher with known pairs: x̂_0 = ref + w (cond - ref)."""
    record = Process(Cosine(), shape=(2,), classes=2, dropout=0.1, estimate="consistency")
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).double()
    oracle = GaussianMixture(
        means,
        COVARIANCE.expand(2, 2, 2),
        labels=torch.tensor([0, 1]),
        process=replace(record, estimate="posterior_mean"),
    )
    objective = DistributionMatching(
        teacher=OracleTeacher(oracle), guidance_range=(1.0, 5.0), time_range=(0.2, 0.6)
    )
    objective.check(record)
    draw = objective.draw(record, SampleKey(0, 0, torch.arange(512), 512))
    x, label = draw.noise, torch.arange(512) % 2
    networks = Networks(OracleTeacher(oracle).denoiser())
    guided = objective._teacher_x0(networks, x, label, draw)
    own, reference = oracle(x, draw.level, label).x0, oracle(x, draw.level).x0
    scale = ((guided - reference) * (own - reference)).sum(1) / (own - reference).square().sum(1)
    assert 1 <= scale.min() < 1.1
    assert 4.9 < scale.max() <= 5.001
    assert abs(float(scale.mean()) - 3) < 0.15
    half = objective.draw(record, replace(draw.key, index=torch.arange(256, 512)))
    again = objective._teacher_x0(networks, x[256:], label[256:], half)
    torch.testing.assert_close(again, guided[256:], rtol=1e-5, atol=1e-5)


CASES = {
    "steps 0": (lambda: Student(0), "student.steps is 0, expected 1 to 64 evaluations"),
    "unknown divergence": (lambda: Divergence("x"), "divergence.name is 'x', expected one of"),
    "no discriminator": (
        lambda: setup_plain(divergence=Divergence("js")),
        "js, whose weight depends on p/q, which no discriminator estimates: set discriminator",
    ),
    "adversarial": (lambda: setup_plain(adversarial=1.0), "adversarial is 1.0, expected at least"),
    "unused": (
        lambda: setup_plain(discriminator=NetworkDiscriminator(network=Perceptron)),
        "the discriminator is not used",
    ),
    "time range": (lambda: setup_plain(time_range=(0.5, 0.2)), "time_range is (0.5, 0.2)"),
    "inherited": (
        lambda: setup_plain(offset=0.1),
        "offset is 0.1, which DistributionMatching does",
    ),
    "guidance range": (
        lambda: setup_plain(guidance_range=(1.0, float("inf"))),
        "guidance_range is (1.0, inf), expected finite w",
    ),
    "alpha": (
        lambda: ScoreIdentity(
            teacher=OracleTeacher(gaussian(MEAN, COVARIANCE)), alpha=float("nan")
        ),
        "alpha is nan, expected a finite factor",
    ),
    "teacher": (
        lambda: DistributionMatching(teacher="runs/digits"),
        "teacher is 'runs/digits', expected a Teacher",
    ),
    "betas": (lambda: NetworkTraining(betas=(0.9,)), "betas is (0.9,), expected two numbers"),
    "steps 2.5": (lambda: Student(2.5), "student.steps is 2.5, expected 1 to 64"),
    "two guidances": (
        lambda: DistributionMatching(
            teacher=OracleTeacher(gaussian(MEAN, COVARIANCE), CFG(2.0)), guidance_range=(1, 2)
        ),
        "guidance_range is (1, 2), and teacher.guidance is",
    ),
    "no network": (lambda: NetworkDiscriminator(), "discriminator.network is missing"),
    "r1": (lambda: FeatureDiscriminator(r1=-1.0), "discriminator.r1 is -1.0"),
    "updates": (lambda: NetworkTraining(0), "updates is 0, expected at least 1"),
    "identity": (
        lambda: ScoreIdentity(
            teacher=OracleTeacher(gaussian(MEAN, COVARIANCE)),
            divergence=Divergence("kl"),
            discriminator=NetworkDiscriminator(network=Perceptron),
        ),
        "ScoreIdentity minimises Fisher's divergence",
    ),
    "estimate": (
        lambda: setup_plain().check(replace(PROCESS, estimate="posterior_mean")),
        "process.estimate is posterior_mean, but the x_0 of a student is a sample",
    ),
    "grid": (
        lambda: setup_plain(student=Student(1, Explicit((-9.0, 2.0)))).check(PROCESS),
        "whose last knot is at λ = 2: choose a grid with a clean end",
    ),
    "shape": (
        lambda: setup_plain().check(replace(PROCESS, shape=(3,))),
        "process.shape of the student is (3,), but that of the teacher is (2,)",
    ),
    "no condition": (
        lambda: setup_plain(guidance_range=(1.0, 2.0)).check(PROCESS),
        "the process has no condition that the teacher could be guided by",
    ),
}


def setup_plain(**options):
    return DistributionMatching(teacher=OracleTeacher(gaussian(MEAN, COVARIANCE)), **options)


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_trained_is_refused_with_the_remedy(name):
    build, message = CASES[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        build()


def test_a_discriminator_without_features_is_refused_before_training():
    objective = setup_plain(discriminator=FeatureDiscriminator(), adversarial=1.0)
    student = Denoiser(Perceptron(), PROCESS)
    with pytest.raises(ValueError, match="backbone is teacher, which is no network and has no fea"):
        objective.networks(student, torch.device("cpu"), lambda network: network)
    fake = replace(objective, discriminator=FeatureDiscriminator(backbone="fake"))
    affine = Denoiser(Affine(A, B), PROCESS)
    with pytest.raises(ValueError, match="the fake is a Affine without blocks, so that there are"):
        fake.networks(affine, torch.device("cpu"), lambda network: network)
    named = FeatureDiscriminator(backbone="fake", blocks=("layers.9",))
    with pytest.raises(ValueError, match=r"names layers.9, which is no module of the fake: its"):
        replace(objective, discriminator=named).networks(
            student, torch.device("cpu"), lambda network: network
        )


@pytest.mark.parametrize("flow", [False, True])
def test_a_teacher_of_another_schedule_is_matched_in_level(flow):
    record = replace(PROCESS, schedule=Flow()) if flow else PROCESS
    teacher = OracleTeacher(gaussian(MEAN, COVARIANCE, record))
    objective = DistributionMatching(teacher=teacher)
    networks = objective.networks(
        Denoiser(Perceptron(), PROCESS), torch.device("cpu"), lambda network: network
    )
    level = PROCESS.schedule.level(0.4)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    expected = gaussian(MEAN, COVARIANCE)(x, level).x0
    torch.testing.assert_close(networks.teacher(x, level).x0, expected)
