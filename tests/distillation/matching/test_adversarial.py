"""Adversarial students: at the exact answer both compared samples are equally distributed."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from diffcore.core.condition_values import seed_bytes, seeds_of_bytes
from diffcore.core.conditions import ConditionRecord
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.distillation import (
    DenoisingGAN,
    DiffusionGAN,
    FeatureDiscriminator,
    NetworkDiscriminator,
    NoiseChannels,
    SelfCooperative,
    Student,
)
from diffcore.distillation.matching.adversarial import AdaptiveDiscriminator
from diffcore.distillation.matching.denoising_gan import posterior
from diffcore.distillation.matching.discriminator import (
    DISCRIMINATOR,
    discriminator_losses,
    generator_losses,
)
from diffcore.networks import NoiseEmbedding, Perceptron
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks, TrainedNetwork
from diffcore.samplers import Consistency
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Trailing

BATCH = 40_000
PROCESS = Process(Cosine(), prediction="v_prediction", shape=(2,), estimate="consistency")
SPREAD = torch.tensor([0.8, 0.4])
NETWORK = NetworkDiscriminator(network=partial(Perceptron, [2], width=16))


class Conditional(nn.Module):
    """x_0 ~ p(x_0 | x_t) of data N(0, diag s²), with the spread of the samples times `factor`."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, time):
        level = PROCESS.schedule.level((time.double() + 1) / 1000)
        alpha, sigma = (value.to(x)[:, None] for value in (level.alpha, level.sigma))
        variance = alpha**2 * SPREAD**2 + sigma**2
        mean = alpha * SPREAD**2 / variance * x
        z = torch.randn(x.shape)
        x0 = mean + self.factor * (SPREAD * sigma / variance.sqrt()) * z
        return (alpha * x - x0) / sigma


def compared(objective, student, module=None):
    """Real and fake samples of all steps of a student."""
    torch.manual_seed(9)
    trained = {} if module is None else {DISCRIMINATOR: TrainedNetwork(module)}
    data = SPREAD * torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(1))
    found = {}
    for step in range(12):
        draw = objective.draw(PROCESS, SampleKey(2, step, torch.arange(BATCH), BATCH))
        index = objective.student.step_index(draw)
        if index not in found:
            found[index] = objective.compare(
                Denoiser(student, PROCESS), data, None, draw, Networks(None, trained)
            )
    assert set(found) == set(range(objective.student.steps))
    return found


OBJECTIVES = {
    "self-cooperative": SelfCooperative(discriminator=NETWORK, student=Student(3)),
    "denoising": DenoisingGAN(discriminator=NETWORK, student=Student(3)),
    "diffusion": DiffusionGAN(discriminator=NETWORK, student=Student(2)),
}


def moments(name, factor):
    """Largest difference of the covariances of both sides over all steps."""
    objective = OBJECTIVES[name]
    module = objective._wrap(nn.Identity(), PROCESS.schedule) if name == "diffusion" else None
    if module is not None:
        module.reach.fill_(0.3)
    pairs = compared(objective, Conditional(factor), module).values()
    with torch.no_grad():
        return max(float((p.real.T.cov() - p.fake.T.cov()).abs().max()) for p in pairs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_sides_are_equally_distributed_at_the_exact_answer_alone(name):
    exact, wrong = moments(name, 1.0), moments(name, 1.4)
    assert exact < 0.02, exact
    assert wrong > 0.06


def test_the_posterior_is_that_of_two_gaussian_observations():
    """Precisions add: x_s has the prior N(α_s x_0, σ_s²) and is observed as x_t = a x_s + b ε."""
    t, s = PROCESS.schedule.level(0.7), PROCESS.schedule.level(0.4)
    a = t.alpha / s.alpha
    b2 = t.sigma**2 - (a * s.sigma) ** 2
    variance = 1 / (1 / s.sigma**2 + a**2 / b2)
    x, x0 = torch.tensor([[0.3]]), torch.tensor([[-0.8]])
    mean = variance * (s.alpha * x0 / s.sigma**2 + a * x / b2)
    found = [posterior(x, x0, t, s, torch.full((1, 1), z)) for z in (0.0, 1.0)]
    torch.testing.assert_close(found[0], mean)
    assert float(found[1] - found[0]) == pytest.approx(variance**0.5)
    clean = PROCESS.schedule.at(torch.inf)
    assert posterior(x, x0, t, clean, x) is x0
    noise = PROCESS.schedule.level(1.0)
    alone = posterior(x, x0, noise, s, torch.zeros(1, 1))
    torch.testing.assert_close(alone, s.alpha * x0)


def test_the_cleaner_side_of_a_self_cooperative_student_is_its_own_without_gradient():
    pairs = compared(OBJECTIVES["self-cooperative"], Conditional())
    for index, pair in pairs.items():
        assert pair.fake.requires_grad
        assert not pair.real.requires_grad
        assert pair.further.shape == (BATCH,)
        assert (pair.further > 0).any(), index


def test_the_discriminator_of_a_self_cooperative_student_compares_each_step_on_its_own():
    """Summed over the steps, samples of the cleaner steps are on both sides and cancel: a
    discriminator that does not know the step cannot judge them."""
    objective = OBJECTIVES["self-cooperative"]
    knots = objective.student.knots(PROCESS.schedule)
    data = SPREAD * torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(1))
    pairs = compared(objective, Conditional())
    assert {index: pair.level for index, pair in pairs.items()} == dict(enumerate(knots[:-1]))
    assert torch.equal(pairs[2].real, data)


def test_the_losses_are_those_of_logistic_regression_with_the_r1_penalty():
    x = torch.tensor([[0.5, -1.0], [2.0, 0.3]], requires_grad=True)
    logits = (x**2).sum(1)
    losses = discriminator_losses(logits, torch.tensor([1.0, -1.0]), x, r1=0.7)
    plain = torch.log1p(torch.exp(-logits)) + torch.log1p(torch.tensor([1.0, -1.0]).exp())
    torch.testing.assert_close(losses, plain + 0.35 * (2 * x).square().sum(1))
    torch.testing.assert_close(discriminator_losses(logits, torch.tensor([1.0, -1.0])), plain)
    torch.testing.assert_close(generator_losses(logits), torch.log1p(torch.exp(-logits)))
    assert torch.autograd.grad(losses.sum(), x)[0].abs().min() > 0


class Attention(nn.Module):
    """Attention over four tokens of x, by torch's kernels or spelled out."""

    def __init__(self, is_fused=True):
        super().__init__()
        self.linear, self.is_fused = nn.Linear(2, 32), is_fused

    def forward(self, x, time):
        q = self.linear(x).sin().view(-1, 1, 4, 8)
        if self.is_fused:
            return nn.functional.scaled_dot_product_attention(q, q, q)
        return ((q @ q.mT) / 8**0.5).softmax(-1) @ q


def test_the_r1_penalty_is_differentiated_through_attention():
    """Its fast kernels have no second derivative."""
    x, gradients = torch.linspace(-1, 1, 12).view(6, 2), []
    for is_fused in (True, False):
        torch.manual_seed(0)
        discriminator = NetworkDiscriminator(network=partial(Attention, is_fused), r1=3.0)
        module = discriminator.module({}, PROCESS)
        networks = Networks(None, {DISCRIMINATOR: TrainedNetwork(module)})
        level = PROCESS.schedule.level(0.5)
        discriminator.losses(networks, PROCESS, (x, -x), level, None).sum().backward()
        gradients.append(module.linear.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_reach_grows_while_the_discriminator_is_too_good():
    module = AdaptiveDiscriminator(nn.Identity(), Cosine(), target=0.6, speed=0.05)
    for _ in range(3):
        module.update(torch.tensor([9.0, 10.0]))
    assert float(module.reach) == pytest.approx(0.2)
    module.update(torch.tensor([5.0, 10.0]))
    assert float(module.reach) == pytest.approx(0.15)
    for _ in range(40):
        module.update(torch.tensor([9.0, 10.0]))
    assert float(module.reach) == 1
    for _ in range(40):
        module.update(torch.tensor([-9.0, 10.0]))
    assert float(module.reach) == pytest.approx(0.05)


def test_the_reach_adapts_by_the_logits_that_the_discriminator_is_trained_with():
    """The data and the samples are evaluated once in an update."""
    objective, count = DiffusionGAN(discriminator=NETWORK), 16
    student = Denoiser(Perceptron([2], width=16), PROCESS)
    networks = objective.networks(student, torch.device("cpu"), lambda network: network)
    module, logits = networks.module(DISCRIMINATOR), []
    nn.init.normal_(module.module.last.weight)
    module.register_forward_hook(lambda _, given, output: logits.append(output.flatten(1).mean(1)))
    draw = objective.draw(PROCESS, SampleKey(0, 0, torch.arange(count), count))
    data = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    losses = objective.network_losses(DISCRIMINATOR, student, data, None, draw, networks)
    true, false = logits
    torch.testing.assert_close(losses, softplus(-true) + softplus(false))
    assert module.take().tolist() == [float(true.detach().sign().sum()), count]


def test_the_levels_of_the_reach_are_those_of_the_schedule():
    module = AdaptiveDiscriminator(nn.Identity(), Cosine(), target=0.6, speed=0.5)
    level = module.level(torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3, 2))
    expected = Cosine().level(torch.tensor([0.001, 0.251, 0.501]).double())
    for name in ("logsnr", "t", "alpha", "sigma"):
        found = getattr(level, name)
        assert found.shape == (3, 1)
        torch.testing.assert_close(
            found[:, 0], getattr(expected, name).float(), rtol=1e-5, atol=1e-5
        )


def test_noise_channels_draw_z_by_the_seed_of_the_sample_and_by_the_time():
    network = NoiseChannels(partial(Perceptron, [4], width=16), channels=2)
    nn.init.normal_(network.network.last.weight)
    seeds = torch.tensor([3, 4, 2**40 + 3, -1, 3])
    x, time = torch.zeros(5, 2), torch.tensor([9.0, 9.0, 9.0, 9.0, 8.5])
    first = network(x, time, seed_bytes=seed_bytes(seeds))
    assert first.shape == (5, 2)
    assert len(first.unique(dim=0)) == 5
    seen = []
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(x, time, seed_bytes=seed_bytes(seeds).bfloat16())
    network(x[3:], time[3:], seed_bytes=seed_bytes(seeds[3:]))
    assert torch.equal(seen[0][3:], seen[1])
    position = time[3:].view(torch.int32)
    expected = normal(seeds[3:], Stream.INPUT_NOISE, position, (2,))
    assert torch.equal(seen[1][:, 2:], expected)
    with pytest.raises(ValueError, match=r"give process.conditions a seed_bytes of shape"):
        network(x, time)
    with pytest.raises(ValueError, match="channels is 0"):
        NoiseChannels(partial(Perceptron, [4]), channels=0)


def test_a_network_with_an_embedded_latent_starts_as_the_one_without_it():
    network = NoiseEmbedding(partial(Perceptron, [2], width=16), size=3)
    nn.init.normal_(network.network.last.weight)
    x, time = torch.zeros(3, 2), torch.tensor([9.0, 9.0, 8.5])
    numbers = seed_bytes(torch.tensor([3, 4, 3]))
    alone = Perceptron([2], width=16)
    alone.load_state_dict(network.network.state_dict())
    torch.testing.assert_close(network(x, time, seed_bytes=numbers), alone(x, time))
    nn.init.normal_(network.latent[-1].weight)
    found = network(x, time, seed_bytes=numbers)
    assert len(found.unique(dim=0)) == 3
    torch.testing.assert_close(network(x[2:], time[2:], seed_bytes=numbers[2:]), found[2:])
    with pytest.raises(ValueError, match=r"give process.conditions a seed_bytes of shape"):
        network(x, time)
    with pytest.raises(ValueError, match="size is 0"):
        NoiseEmbedding(partial(Perceptron, [2]), size=0)


def test_the_bytes_of_a_seed_give_the_seed():
    seeds = torch.tensor([0, 1, 255, 256, -1, 2**62 + 12345, -(2**63), 2**63 - 1])
    numbers = seed_bytes(seeds)
    assert numbers.shape == (8, 8)
    assert numbers.min() == 0
    assert numbers.max() == 255
    assert torch.equal(seeds_of_bytes(numbers.bfloat16()), seeds)


def test_samples_of_a_network_with_latents_depend_on_their_seeds_alone():
    record = ConditionRecord((8,), 0.0, 255.0, absent="null", null=(0.0,))
    process = replace(PROCESS, conditions={"seed_bytes": record})
    network = NoiseChannels(partial(Perceptron, [4], width=16), channels=2)
    nn.init.normal_(network.network.last.weight)
    draw = partial(sample, Denoiser(network, process), Consistency(), Trailing(), 3)
    together = draw(seeds=range(6), batch_size=4).x
    torch.manual_seed(1)
    alone = draw(seeds=[4, 2], batch_size=4).x
    assert torch.equal(alone, together[[4, 2]])
    torch.testing.assert_close(draw(seeds=[4], batch_size=1).x, together[4:5])
    ignored = draw(seeds=[4], batch_size=4, condition={"seed_bytes": torch.full((8,), 7.0)}).x
    assert torch.equal(ignored, together[4:5])
    objective = DenoisingGAN(discriminator=NETWORK, student=Student(2))
    key = SampleKey(0, 5, torch.arange(3), 8)
    given = objective.draw(process, key).conditions["seed_bytes"]
    part = objective.draw(process, SampleKey(0, 5, torch.arange(1, 3), 8)).conditions["seed_bytes"]
    assert torch.equal(given[1:], part)
    assert len(given.unique(dim=0)) == 3
    assert not torch.equal(given[:, :4], given[:, 4:])  # both halves of 64 bits are drawn


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiffusionGAN(discriminator=NETWORK, target=1.0), "target is 1.0"),
        (lambda: DiffusionGAN(discriminator=NETWORK, speed=0.0), "speed is 0.0"),
        (lambda: SelfCooperative(discriminator=NETWORK, consistency=-1.0), "consistency is -1.0"),
        (
            lambda: DenoisingGAN(discriminator=FeatureDiscriminator()).check(PROCESS),
            r"compares pairs \[x_s, x_t\]: use NetworkDiscriminator",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_discriminator_of_features_needs_a_teacher():
    objective = SelfCooperative(discriminator=FeatureDiscriminator())
    with pytest.raises(ValueError, match="backbone is teacher, which is no network"):
        objective.networks(
            Denoiser(Perceptron(), PROCESS), torch.device("cpu"), lambda network: network
        )
