"""Students of distribution matching in two dimensions: trained, interrupted, and measured."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import TensorDataset

from diffcore.core.conditions import ConditionRecord
from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.distillation import (
    DenoisingGAN,
    DiffusionGAN,
    DistributionMatching,
    Divergence,
    FeatureDiscriminator,
    NetworkDiscriminator,
    NetworkTraining,
    NoiseChannels,
    OracleTeacher,
    ScoreIdentity,
    SelfCooperative,
    Student,
)
from diffcore.evaluation.energy_distance import energy_distance
from diffcore.networks import Perceptron
from diffcore.objectives.draw import SampleKey
from diffcore.samplers import Consistency
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Trailing
from diffcore.training.averages.ema import Decay
from diffcore.training.optimization.compute import Compute
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.trainer import Trainer
from tests.helpers.oracles import COVARIANCES, MEANS, WEIGHTS
from tests.helpers.training_runs import crash_after, hashes, read_checkpoint, read_reports

pytestmark = pytest.mark.usefixtures("one_thread")
PROCESS = Process(Cosine(), shape=(2,), low=-6.0, high=6.0, sigma_data=1.0, estimate="consistency")
TEACHER = GaussianMixture(
    MEANS, COVARIANCES, WEIGHTS, process=replace(PROCESS, estimate="posterior_mean")
)


def trainer(folder, objective, **options):
    data = TEACHER.sample(torch.arange(2048)).float()
    defaults = {
        "network": partial(Perceptron, [2], width=64, layers=3),
        "data": TensorDataset(data),
        "process": PROCESS,
        "optimizer": torch.optim.AdamW,
        "folder": folder,
        "objective": objective,
        "lr": LearningRate(5e-4, warmup=20),
        "ema": Decay(0.99),
        "batch_size": 128,
        "log_every": 1,
        "trackers": [],
        "sampler": Consistency(),
        "grid": Trailing(),
    }
    return Trainer(**(defaults | options))


OBJECTIVES = {
    "plain": DistributionMatching(teacher=OracleTeacher(TEACHER)),
    "three networks": DistributionMatching(
        teacher=OracleTeacher(TEACHER),
        student=Student(2),
        fake=NetworkTraining(2),
        divergence=Divergence("js", decay=0.5),
        discriminator=FeatureDiscriminator(backbone="fake", width=16, r1=0.1),
        adversarial=0.1,
    ),
    "trained backbone": DistributionMatching(
        teacher=OracleTeacher(TEACHER),
        fake=NetworkTraining(1),
        discriminator=FeatureDiscriminator(backbone="fake", width=16, backbone_weight=0.5),
        adversarial=0.1,
    ),
    "own discriminator": DistributionMatching(
        teacher=OracleTeacher(TEACHER),
        fake=NetworkTraining(1, lr=LearningRate(2e-3)),
        discriminator=NetworkDiscriminator(network=partial(Perceptron, [2], width=16), r1=0.1),
        adversarial=0.1,
    ),
    "score identity": ScoreIdentity(teacher=OracleTeacher(TEACHER), alpha=1.0),
}
CRITIC = NetworkDiscriminator(network=partial(Perceptron, [2], width=16), r1=0.1)
PAIRS = NetworkDiscriminator(network=partial(Perceptron, [4], width=16), r1=0.1)
ADVERSARIAL = {
    "self-cooperative": SelfCooperative(discriminator=CRITIC, student=Student(2)),
    "diffusion": DiffusionGAN(discriminator=CRITIC, speed=0.1),
    "denoising": DenoisingGAN(discriminator=PAIRS, student=Student(2)),
}


LATENT = {
    "network": partial(NoiseChannels, partial(Perceptron, [4], width=16), 2),
    "process": replace(
        PROCESS,
        conditions={"seed_bytes": ConditionRecord((8,), 0, 255, absent="null", null=(0,))},
    ),
}
"""A student with the latent z of a denoising diffusion GAN."""


@pytest.mark.parametrize("name", OBJECTIVES | ADVERSARIAL)
def test_every_network_of_an_objective_is_trained(tmp_path, name):
    objective = (OBJECTIVES | ADVERSARIAL)[name]
    state = trainer(tmp_path, objective, steps=3, batch_size=16, save_every=1).train()
    first, last = (read_checkpoint(tmp_path, step) for step in (2, 3))
    for network in state.further:
        tensors = first[f"{network}.safetensors"]
        changed = [
            key for key in tensors if not tensors[key].equal(last[f"{network}.safetensors"][key])
        ]
        assert len(changed) > 0.7 * len(tensors), network
    for line in read_reports(tmp_path):
        assert line["skipped"] == 0
        assert all(line[f"loss/{network}"] > 0 for network in state.further)


@pytest.mark.parametrize("name", ["three networks", "diffusion", "denoising"])
def test_a_resumed_run_of_students_and_discriminators_writes_the_same_bytes(tmp_path, name):
    options = {"steps": 6, "batch_size": 16, "save_every": 2, "log_every": 3}
    if name == "denoising":
        options |= LATENT
    build = partial(trainer, objective=(OBJECTIVES | ADVERSARIAL)[name], **options)
    build(tmp_path / "straight").train()
    crash_after(build(tmp_path / "resumed"), 4)
    build(tmp_path / "resumed", resume=True).train()
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    statistics = read_checkpoint(tmp_path / "resumed", 6)["discriminator.safetensors"]
    if name == "three networks":
        assert statistics["mean_weight.share"].max() > 0.5
    if name == "diffusion":
        assert 0.1 <= statistics["reach"] <= 1


def test_accumulation_changes_a_run_with_latents_by_rounding_alone(tmp_path):
    build = partial(trainer, objective=ADVERSARIAL["denoising"], steps=4, batch_size=16, **LATENT)
    build(tmp_path / "whole").train()
    build(tmp_path / "parts", accumulation=4).train()
    for line, true in zip(
        *map(read_reports, (tmp_path / "parts", tmp_path / "whole")), strict=True
    ):
        for name in ("loss", "loss/discriminator"):
            assert line[name] == pytest.approx(true[name], rel=1e-5, abs=1e-5), name


def test_the_loss_of_the_discriminator_is_added_to_that_of_the_network_whose_features_it_reads():
    objective = OBJECTIVES["trained backbone"]
    torch.manual_seed(0)
    student = Denoiser(Perceptron([2], width=16, layers=3), PROCESS)
    networks = objective.networks(student, torch.device("cpu"), lambda network: network)
    draw = objective.draw(PROCESS, SampleKey(0, 3, torch.arange(8), 8))
    x0 = TEACHER.sample(torch.arange(8)).float()

    def losses(objective, name):
        return objective.network_losses(name, student, x0, None, draw, networks)

    alone = replace(objective, discriminator=replace(objective.discriminator, backbone_weight=0.0))
    expected = losses(alone, "fake") + 0.5 * losses(alone, "discriminator")
    found = losses(objective, "fake")
    torch.testing.assert_close(found, expected)
    assert (found - losses(alone, "fake")).abs().min() > 0.1
    fake, heads = (networks.module(name) for name in ("fake", "discriminator"))
    heads.requires_grad_(False)
    difference = (found - losses(alone, "fake")).mean()
    gradients = torch.autograd.grad(difference, list(fake.parameters()), allow_unused=True)
    assert sum(g is not None and bool(g.abs().max() > 1e-6) for g in gradients) > 4
    with pytest.raises(ValueError, match=r"0 for the teacher, which is frozen"):
        FeatureDiscriminator(backbone_weight=0.1)


@pytest.mark.slow
def test_accumulation_changes_a_run_of_three_networks_by_rounding_alone(tmp_path):
    build = partial(trainer, objective=OBJECTIVES["three networks"], steps=5, batch_size=16)
    build(tmp_path / "whole").train()
    build(tmp_path / "parts", accumulation=4).train()
    for line, true in zip(
        *map(read_reports, (tmp_path / "parts", tmp_path / "whole")), strict=True
    ):
        for name in ("loss", "loss/fake", "loss/discriminator"):
            assert line[name] == pytest.approx(true[name], rel=1e-5, abs=1e-5), name


def distance(state, steps):
    """Energy distance of the averaged student's samples to exact ones."""
    truth = TEACHER.sample(torch.arange(10**6, 10**6 + 4096)).float()
    with state.average.applied():
        denoiser = state.denoiser.eval()
        found = sample(
            denoiser, Consistency(), Trailing(), steps, seeds=range(4096), batch_size=4096
        )
    return energy_distance(found.x, truth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "bound"), [("plain", 1, 0.01), ("three networks", 2, 0.06)]
)
def test_the_student_of_an_exact_teacher_comes_near_the_truth(tmp_path, name, steps, bound):
    """Exact samples are at 0.0004; the students at 0.002 and 0.02 (1000 and 800 steps)."""
    lr = LearningRate(1e-3, warmup=20)
    state = trainer(tmp_path, OBJECTIVES[name], steps=800, log_every=100, lr=lr).train()
    assert distance(state, steps) < bound


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.parametrize(
    "compute",
    [Compute(compile="blocks", backend="eager"), Compute(checkpointing=True)],
    ids=["compiled", "checkpointed"],
)
def test_compiled_and_checkpointed_networks_give_the_same_losses(tmp_path, compute):
    """The student, the fake network and the hooks that read its features."""
    build = partial(trainer, objective=OBJECTIVES["three networks"], steps=3, batch_size=16)
    build(tmp_path / "plain").train()
    build(tmp_path / "changed", compute=compute).train()
    for line, true in zip(
        *map(read_reports, (tmp_path / "changed", tmp_path / "plain")), strict=True
    ):
        for name in ("loss", "loss/fake", "loss/discriminator"):
            assert line[name] == pytest.approx(true[name], rel=1e-5, abs=1e-6), name
