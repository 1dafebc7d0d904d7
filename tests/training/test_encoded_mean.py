"""A run with a learned encoder of x_0: trained, resumed, sampled and measured."""

import pytest
import torch

from diffcore.core.encoding.encoded_mean import find_mean_encoder
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import variational_bound
from diffcore.networks import MeanEncoderNetwork, Perceptron
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO
from diffcore.run import Run
from diffcore.samplers import DDPM
from diffcore.sampling.generation import sample
from diffcore.schedules import LogLinear, Trailing
from diffcore.training.data import Digits
from diffcore.training.ranks.sharding import Sharding
from tests.helpers.training_runs import check_resumed_run, make_trainer

SHAPE = (1, 8, 8)
OPTIONS = {
    "process": Process(LogLinear(-5.0, 8.0), shape=SHAPE, estimate="encoded_mean"),
    "objective": Objective(ELBO(), corrected=True),
    "sampler": DDPM(),
    "grid": Trailing(),
    "sample_every": 3,
    "save_every": 3,
    "sample_steps": 4,
}


def network():
    return MeanEncoderNetwork(lambda: Perceptron(SHAPE, 16, 1), lambda: Perceptron(SHAPE, 8, 1))


def test_a_run_trains_its_encoder_and_resumes_bit_for_bit(tmp_path):
    whole = check_resumed_run(tmp_path, network=network, **OPTIONS)
    before, after = network().state_dict(), whole.network.state_dict()
    for part in ("network.last.weight", "encoder.last.weight"):
        assert not torch.equal(before[part], after[part])
    denoiser = Run(tmp_path / "whole").denoiser(network=network())
    assert find_mean_encoder(denoiser.network) is not None
    assert denoiser.process.estimate == "encoded_mean"
    assert sample(denoiser, grid=Trailing(), seeds=range(3), steps=4).x.isfinite().all()
    bound = variational_bound(denoiser, Digits("test").x0[:4], 17, steps=4)
    assert bound.bits.isfinite().all()


def test_a_sharded_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="from whole weights: set it to none"):
        make_trainer(tmp_path, network=network, sharding=Sharding("full"), **OPTIONS)
