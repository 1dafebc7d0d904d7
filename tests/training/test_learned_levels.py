"""A run with learned levels of the pixels: resumed, on two ranks, sampled and measured."""

import os
import subprocess
import sys

import pytest
import torch

from diffcore.core.network import find_learned_levels
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import variational_bound
from diffcore.networks import LearnedLevelsNetwork, Perceptron
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO
from diffcore.run import Run
from diffcore.sampling.generation import sample
from diffcore.schedules import LogLinear
from diffcore.training.data import Digits
from diffcore.training.ranks.sharding import Sharding
from tests.helpers.training_runs import check_resumed_run, make_trainer

SHAPE = (1, 8, 8)
OPTIONS = {
    "process": Process(LogLinear(-5.0, 8.0), shape=SHAPE, levels="learned"),
    "objective": Objective(ELBO(), corrected=True),
    "sample_every": 3,
    "save_every": 3,
    "sample_steps": 4,
}


def network():
    return LearnedLevelsNetwork(
        lambda: Perceptron(SHAPE, 16, 1, inputs=2), SHAPE, latent=2, channels=True, width=8
    )


def test_a_run_trains_its_levels_and_resumes_bit_for_bit(tmp_path):
    whole = check_resumed_run(tmp_path, network=network, **OPTIONS)
    before, after = network().state_dict(), whole.network.state_dict()
    for part in ("levels.last.weight", "encoder.last.weight", "network.last.weight"):
        assert not torch.equal(before[part], after[part])
    denoiser = Run(tmp_path / "whole").denoiser(network=network())
    assert find_learned_levels(denoiser.network) is not None
    assert denoiser.process.levels == "learned"
    assert sample(denoiser, seeds=range(3), steps=4).x.isfinite().all()
    bound = variational_bound(denoiser, Digits("test").x0[:4], 17, steps=4)
    assert bound.bits.isfinite().all()
    assert (bound.latent > 0).all()


def test_sharded_levels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="from whole weights: set it to none"):
        make_trainer(tmp_path, network=network, sharding=Sharding("full"), **OPTIONS)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.helpers.training_runs import train
from tests.training.test_learned_levels import OPTIONS, network
train(Path({folder!r}) / sys.argv[1], network=network, **OPTIONS | {{"sample_every": 0}})
"""


@pytest.mark.slow
def test_two_ranks_train_the_levels_of_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT.format(root=os.getcwd(), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for command, name in (([sys.executable], "one"), (launch, "two")):
        subprocess.run([*command, str(script), name], env=environment, check=True, timeout=300)
    one, two = (Run(tmp_path / name).read_weights().tensors for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
