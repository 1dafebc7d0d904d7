"""Pairs of a flow: the ends of the exact flow, cached by their settings, and trained as pairs."""

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process, TimeConditioning
from diffcore.distillation import flow_pairs
from diffcore.distillation.flow_pairs import FlowPairs
from diffcore.distillation.straightness import straightness
from diffcore.distillation.teacher import OracleTeacher
from diffcore.guidance import CFG
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDIM, Heun
from diffcore.schedules import Flow, UniformBlend
from diffcore.training.data.source import NOISE
from tests.helpers.oracles import mixture, process
from tests.helpers.training_runs import make_trainer

SCALE = 0.3
FLOW = Process(
    Flow(), "flow_prediction", TimeConditioning("t"), shape=(2,), classes=0, sigma_data=1.0
)


def gaussian(scale=SCALE):
    """N(0, s² I): its flow maps ε to s ε."""
    return GaussianMixture(torch.zeros(1, 2), scale**2 * torch.eye(2)[None], process=FLOW)


def pairs(folder, **options):
    defaults = {"count": 40, "sampler": Heun(), "grid": UniformBlend(), "steps": 40}
    data = FlowPairs(OracleTeacher(gaussian()), str(folder), **(defaults | options))
    data.prepare(torch.device("cpu"), True)
    return data


def test_the_pairs_of_a_gaussian_are_the_ends_of_its_exact_flow(tmp_path):
    data = pairs(tmp_path)
    assert len(data) == 40
    noise = torch.stack([data[index][2][NOISE] for index in range(40)])
    ends = torch.stack([data[index][0] for index in range(40)])
    torch.testing.assert_close(ends, SCALE * noise, rtol=1e-3, atol=1e-3)
    assert len(noise.unique(dim=0)) == 40


def test_labels_are_spread_over_the_classes_and_guidance_acts_on_the_pairs(tmp_path):
    teachers = [OracleTeacher(mixture(process(Flow())), CFG(scale)) for scale in (1.0, 3.0)]
    data = [FlowPairs(teacher, str(tmp_path), 64, DDIM(), steps=4) for teacher in teachers]
    for each in data:
        each.prepare(torch.device("cpu"), True)
    labels = torch.tensor([data[0][index][1] for index in range(64)])
    assert labels.unique().tolist() == [0, 1]
    assert torch.equal(labels, data[0].labels)
    assert 16 < int(labels.sum()) < 48
    assert data[0].content_hash != data[1].content_hash
    assert not torch.equal(data[0][3][0], data[1][3][0])
    assert torch.equal(data[0][3][2][NOISE], data[1][3][2][NOISE])


def test_an_interrupted_computation_continues_with_the_missing_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(flow_pairs, "SHARD", 16)
    whole = pairs(tmp_path / "whole")
    assert [path.stem[-2:] for path in whole.shards] == ["16", "16", "-8"]
    part = pairs(tmp_path / "part")
    kept, lost = part.shards[0], part.shards[1]
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert not part.is_ready
    flow_pairs._open.cache_clear()
    again = pairs(tmp_path / "part")
    assert again.is_ready
    assert kept.stat().st_mtime_ns == before
    for index in range(40):
        assert torch.equal(again[index][0], whole[index][0])


def test_a_damaged_shard_is_named(tmp_path):
    data = pairs(tmp_path)
    path = data.shards[0]
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="delete it, and it is computed again"):
        data.prepare(torch.device("cpu"), True)


@pytest.mark.parametrize("options", [{"count": 0}, {"steps": 0}, {"seed": -1}])
def test_impossible_pairs_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="of the pairs is"):
        pairs(tmp_path, **options)


class Line(nn.Module):
    """v = (1 - s) ε at x = (s + (1-s) a) ε: the straight flow between ε and s ε."""

    def forward(self, x, time):
        return (1 - SCALE) * x / (SCALE + (1 - SCALE) * time[:, None] / 1000)


def test_the_straight_flow_between_the_pairs_has_loss_zero_and_straightness_zero(tmp_path):
    data = pairs(tmp_path, steps=100)
    straight = Denoiser(Line(), FLOW)
    objective, rows = Objective(MSE("flow_prediction")), range(40)
    trainer = make_trainer(tmp_path / "run", network=Line, data=data, process=FLOW)
    key = SampleKey(trainer.seed, 0, torch.arange(40), 40)
    draw = objective.draw(FLOW, key).paired(torch.stack([data[i][2][NOISE] for i in rows]))
    x0 = torch.stack([data[i][0] for i in rows])
    assert objective(straight, x0, None, draw).max() < 1e-6
    assert straightness(straight, range(64)) < 1e-10
    assert straightness(gaussian(), range(64)) > 1e-2


def test_straightness_of_a_gaussian_is_its_integral():
    """z_a = n ε with n² = (1-a)² s² + a², so that v = n' ε and S = ∫ ((1 - s) - n')² da."""
    a = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    n = ((1 - a) ** 2 * SCALE**2 + a**2).sqrt()
    slope = (a - (1 - a) * SCALE**2) / n
    expected = torch.trapezoid((1 - SCALE - slope) ** 2, a)
    found = straightness(gaussian(), range(4000), steps=200)
    assert found == pytest.approx(float(expected), rel=0.05)


def test_training_uses_the_noise_of_the_pairs(tmp_path):
    """With the noise of another sample, the loss of the straight flow would not be 0."""
    data = pairs(tmp_path, steps=100)

    class Trained(Line):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, time):
            return self.scale * super().forward(x, time)

    objective = Objective(MSE("flow_prediction"))
    trainer = make_trainer(
        tmp_path / "run", network=Trained, data=data, process=FLOW, objective=objective
    )
    state = trainer.train()
    assert abs(float(state.network.scale.detach()) - 1) < 1e-4


def test_options_that_change_the_noise_of_a_pair_are_refused(tmp_path):
    data = pairs(tmp_path)
    with pytest.raises(ValueError, match="pairs each x_0 with its own noise"):
        make_trainer(
            tmp_path / "run", network=Line, data=data, process=FLOW, objective=Objective(offset=0.1)
        )
