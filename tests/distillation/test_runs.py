"""Training runs of few-step networks: resumed bit for bit, and started from a denoiser."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from diffcore.core.conditions import ConditionRecord
from diffcore.core.denoiser import Denoiser, extract_tensor
from diffcore.core.noise import Noise
from diffcore.core.process import TimeConditioning
from diffcore.distillation import (
    Consistency,
    ContinuousConsistency,
    KnotIntervals,
    MeanFlow,
    RunTeacher,
    Shortcut,
)
from diffcore.networks import GuidanceEmbedding, Perceptron, TwoTimes
from diffcore.objectives.weighting import MSE
from diffcore.run import Run
from diffcore.samplers import DDIM
from diffcore.samplers import Consistency as ConsistencySampler
from diffcore.sampling.loop import integrate
from diffcore.schedules import Flow, Trailing, UniformBlend
from diffcore.training.data import Digits
from diffcore.training.reports.validation import Validation
from tests.helpers.training_runs import (
    PROCESS,
    crash_after,
    hashes,
    make_trainer,
    read_reports,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = partial(Perceptron, [1, 8, 8], 16, 1, 10)
TWO = partial(TwoTimes, ONE)
SCALED = partial(GuidanceEmbedding, ONE)
DENOISED = replace(
    PROCESS, schedule=Flow(), prediction="flow_prediction", time=TimeConditioning("blend", 20.0)
)
CONFIG = """
network:
  class_path: diffcore.networks.Perceptron
  init_args: {shape: [1, 8, 8], width: 16, layers: 1, classes: 10}
"""
KNOTS = KnotIntervals(UniformBlend(1.25, 0.5), 2, 8, period=2, weighting=MSE("sample"))
METHODS = {
    "consistency": (Consistency(intervals=KNOTS), ONE),
    "continuous": (ContinuousConsistency(warmup=4), ONE),
    "mean flow": (MeanFlow(share=0.5), TWO),
    "shortcut": (Shortcut(), TWO),
    "scales": (Consistency(intervals=KNOTS), SCALED),
}
SCALES = {"guidance_scale": ConditionRecord((1,), 1.0, 4.0, absent="null", null=(2.0,))}


def options(name):
    objective, network = METHODS[name]
    few = "mean_velocity" if network is TWO else "consistency"
    return {
        "objective": objective,
        "network": network,
        "process": replace(DENOISED, estimate=few, conditions=SCALES if network is SCALED else {}),
        "sampler": DDIM() if few == "mean_velocity" else ConsistencySampler(),
        "grid": Trailing(),
        "sample_steps": 2,
        "save_every": 1,
        "validation": Validation(data=Digits(), every=3, items=32),
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few") / "teacher"
    train(folder, steps=2, network=ONE, config=CONFIG, process=DENOISED)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "consistency",
        "mean flow",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("continuous", "shortcut", "scales")),
    ],
)
def test_a_resumed_run_with_a_teacher_and_a_curriculum_writes_the_same_bytes(
    tmp_path, teacher, name
):
    settings = options(name)
    scales = {"guidance_range": (1.0, 4.0)} if name == "scales" else {}
    settings["objective"] = replace(
        settings["objective"], teacher=RunTeacher(str(teacher)), **scales
    )
    settings["init"] = str(teacher)
    train(tmp_path / "straight", **settings)
    crash_after(make_trainer(tmp_path / "resumed", **settings), 3)
    train(tmp_path / "resumed", resume=True, **settings)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    assert all(
        math.isfinite(row["loss"]) for row in read_reports(tmp_path / "straight") if "loss" in row
    )


def test_a_network_of_two_times_starts_from_the_weights_of_one_of_one_time(
    tmp_path, teacher, capsys
):
    settings = options("mean flow") | {"init": str(teacher), "steps": 1, "save_every": 1}
    state = train(tmp_path / "run", **settings)
    assert "the weights are those of the network inside of TwoTimes" in capsys.readouterr().err
    start = Run(teacher).read_weights().tensors
    own = state.network.network.state_dict()
    assert own.keys() == start.keys()
    for name, value in own.items():  # after one small step
        torch.testing.assert_close(value, start[name], atol=3e-3, rtol=0)


def test_a_run_is_sampled_as_its_process_requires(tmp_path):
    settings = options("mean flow") | {"steps": 1}
    state = train(tmp_path / "run", **settings)
    network = state.network.eval()
    process = settings["process"]
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    knots = Trailing().knots(process.schedule, 2)
    label = torch.tensor([1, 2])
    with torch.no_grad():
        found, _ = integrate(
            Denoiser(network, process),
            DDIM(),
            noise,
            knots,
            Noise(torch.arange(2), (1, 8, 8)),
            condition=label,
        )
        x = noise
        for a, r in ((1.0, 0.5), (0.5, 0.0)):
            times = (torch.full((2,), 20.0 * value) for value in (a, r))
            x = x - (a - r) * extract_tensor(
                network(x, next(times), end_time=next(times), class_labels=label)
            )
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_a_run_with_a_sampler_of_denoisers_is_refused_before_it_begins(tmp_path):
    settings = options("consistency") | {"sampler": DDIM(), "sample_every": 3}
    with pytest.raises(ValueError, match=r"use Consistency\(\)"):
        make_trainer(tmp_path, **settings).train()
    settings = options("consistency") | {"network": ONE, "process": options("mean flow")["process"]}
    with pytest.raises(ValueError, match=r"set process.estimate to consistency"):
        make_trainer(tmp_path, **settings).train()
