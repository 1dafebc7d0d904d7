"""The gradient noise scale: without bias, for every split, and without waiting for the device."""

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore.core.process import Process
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.training.construction import build_state
from diffcore.training.loop import advance, training_batches
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.reports.noise_scale import MicroBatchNorms, estimate_noise, mean_noise
from tests.helpers.training_runs import (
    GREY,
    HUGE,
    UNBOUNDED,
    ListDataset,
    crash_after,
    hashes,
    make_trainer,
    read_reports,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 16


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_both_estimates_are_without_bias(micro_batch):
    """Gradients g ~ N(G, diag s²) of samples: means of 20,000 steps, within 4 standard errors."""
    draws = torch.Generator().manual_seed(3)
    mean, std = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])
    shape = (20_000, BATCH // micro_batch, micro_batch, 3)
    micro = (mean + std * torch.randn(shape, generator=draws, dtype=torch.float64)).mean(2)
    steps = torch.stack(
        estimate_noise(
            micro.mean(1).norm(dim=-1), micro.square().sum(-1).mean(1), BATCH, micro_batch
        ),
        1,
    )
    found, error = mean_noise(steps), 4 * steps.std(0) / len(steps) ** 0.5
    assert abs(found.variance - std.square().sum()) < error[0]
    assert abs(found.square - mean.square().sum()) < error[1]
    assert found.scale == pytest.approx(5.25 / 1.25, rel=0.1)


def test_steps_without_an_estimate_do_not_count():
    steps = torch.tensor([[6.0, 2.0], [torch.nan, torch.nan], [2.0, 2.0], [torch.inf, 1.0]])
    assert mean_noise(steps).scale == 2.0
    assert mean_noise(steps[1:2]) is None
    assert mean_noise(torch.zeros(0, 2)) is None
    assert torch.tensor(mean_noise(torch.tensor([[1.0, -0.5]])).scale).isnan()


@pytest.mark.parametrize("micro_batch", [0, 8, 9])
def test_a_micro_batch_that_is_the_batch_is_refused(micro_batch):
    with pytest.raises(ValueError, match=f"micro_batch is {micro_batch}, expected 1 .. 7"):
        estimate_noise(torch.ones(()), torch.ones(()), 8, micro_batch)


def test_the_norms_are_those_of_each_micro_batch_without_the_scale_of_fp16():
    layer = nn.Linear(3, 2)
    inputs = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-1.0, 0.5, 0.0]])]
    squares = []
    for x in inputs:
        gradients = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
        squares.append(sum(gradient.square().sum() for gradient in gradients))
    recorder, scaler = MicroBatchNorms(layer.parameters(), 2), torch.amp.GradScaler("cpu")
    layer(inputs[0]).sum().backward()  # not recorded
    for factor, given in ((1.0, None), (2.0**16, scaler)):
        with recorder.recording():
            for x in inputs:
                (layer(x).square().sum() / 2 * factor).backward()
        found = recorder.mean_square(given)
        torch.testing.assert_close(found, torch.stack(squares).mean(), rtol=1e-6, atol=0)


class Linear(nn.Module):
    """A network whose gradient differs much between levels, without dropout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, time):
        return self.layer(x.flatten(1)).view_as(x) * (1 + time.view(-1, 1, 1, 1) / 200)


STILL = {
    "network": Linear,
    "process": Process(shape=(1, 8, 8)),
    "optimizer": torch.optim.SGD,
    "lr": LearningRate(1e-12, warmup=0),
    "batch_size": 32,
    "log_every": 40,
    "steps": 40,
    "ema": None,
}
"""Options of a run whose weights do not change."""


def still(folder, **options):
    """(variance, square) that a run with constant weights reports."""
    given = {name: value for name, value in STILL.items() if value is not None}
    train(folder, **(given | options))
    (report,) = read_reports(folder)
    return report["grad_variance"], report["grad_square"], report["noise_scale"]


@pytest.mark.slow
def test_a_run_reports_the_covariance_of_the_gradients_of_its_samples(tmp_path):
    """Beside the gradients of 1024 single samples at independent levels."""
    objective = Objective(levels="independent")
    variance, square, scale = still(tmp_path, objective=objective, accumulation=8)
    given = {name: value for name, value in STILL.items() if value is not None}
    state = build_state(make_trainer(tmp_path / "other", objective=objective, **given))
    gradients, parameters = [], list(state.network.parameters())
    for batch in training_batches(state, 32):
        key = SampleKey(0, len(gradients) // 32, batch.batch_index, 32)
        losses = objective(
            state.denoiser, batch.x0, None, objective.draw(state.settings.process, key)
        )
        for loss in losses:
            each = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients.append(torch.cat([gradient.flatten() for gradient in each]))
    table = torch.stack(gradients).double()
    expected = table.var(0).sum()
    assert variance == pytest.approx(float(expected), rel=0.1)
    mean_square = table.mean(0).square().sum() - expected / len(table)
    assert square == pytest.approx(float(mean_square), rel=0.1)
    assert scale == pytest.approx(variance / square)


def test_stratified_levels_give_one_noise_scale_for_every_split(tmp_path):
    """Micro-batches of neighbouring levels would give several times the variance."""
    found = [still(tmp_path / str(parts), accumulation=parts)[2] for parts in (2, 4)]
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_one_micro_batch_on_one_rank_gives_no_estimate(tmp_path):
    train(tmp_path, steps=2)
    assert not any("noise_scale" in report for report in read_reports(tmp_path))


def test_a_resumed_run_reports_the_same_and_may_change_its_split(tmp_path):
    options = {"accumulation": 2, "log_every": 4, "steps": 8, "save_every": 6, "keep": 9}
    train(tmp_path / "straight", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), 6)
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    crash_after(make_trainer(tmp_path / "other", **options), 6)
    train(tmp_path / "other", resume=True, **(options | {"accumulation": 4}))
    reports, others = read_reports(tmp_path / "straight"), read_reports(tmp_path / "other")
    assert reports[0] == others[0]
    names = ("loss", "grad_norm")
    for name in names:
        assert others[1][name] == pytest.approx(reports[1][name], rel=1e-5)
    assert others[1]["grad_variance"] == pytest.approx(reports[1]["grad_variance"], rel=1)


def test_a_step_that_is_not_finite_does_not_enter_the_noise_scale(tmp_path):
    data = ListDataset(*[(GREY, 0)] * 31, (HUGE, 1))
    options = {"data": data, "process": UNBOUNDED, "batch_size": 4, "accumulation": 2}
    train(tmp_path, steps=8, patience=2, log_every=8, **options)
    (report,) = read_reports(tmp_path)
    assert report["skipped"] == 1
    assert report["loss"] is None
    assert report["grad_variance"] > 0
    json.dumps(report, allow_nan=False)


class HostReads(TorchDispatchMode):
    """Counts how often the host reads the value of a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in reads
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device_and_a_report_does(tmp_path):
    """Levels are drawn on the host, where SGD keeps no tensor."""
    state = build_state(make_trainer(tmp_path, accumulation=2, optimizer=torch.optim.SGD))
    batches = list(training_batches(state, 3))
    with HostReads() as draws:
        for place, batch in enumerate(batches):
            key = state.sample_key(place // 2, batch.batch_index)
            state.settings.objective.draw(state.settings.process, key)
    with HostReads() as steps:
        for step in range(3):
            advance(state, iter(batches[2 * step : 2 * step + 2]))
    assert steps.count == draws.count
    with HostReads() as report:
        float(state.window.gathered().mean())
    assert report.count > 0
