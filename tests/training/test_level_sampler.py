"""Adaptive training levels: learned from losses at their own levels, equally on every rank."""

import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffcore.core.process import Process, TimeConditioning
from diffcore.io.safetensors import read_weights
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.objective import Objective
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.schedules import Cosine, Discrete
from diffcore.training.data import Digits
from diffcore.training.optimization.level_sampler import LevelSampler
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.trainer import Trainer
from tests.helpers.training_runs import crash_after, hashes, read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
MOMENT = SecondMoment(bins=4, history=2, update_interval=4)
LEARNED = LearnedSchedule(bins=6, update_interval=4)
PROCESS = Process(shape=(1, 8, 8))
UNBOUNDED = Process(shape=(1, 8, 8), low=-math.inf, high=math.inf)


class Net(nn.Module):
    """A perceptron that is conditioned on the noise level."""

    def __init__(self):
        super().__init__()
        self.time, self.first, self.last = nn.Linear(1, 16), nn.Linear(64, 16), nn.Linear(16, 64)

    def forward(self, x, time):
        hidden = self.first(x.flatten(1)) + self.time(time[:, None] / 1000)
        return self.last(nn.functional.silu(hidden)).view_as(x)


def make_trainer(folder, objective, **options):
    defaults = {
        "network": Net,
        "data": Digits(),
        "process": PROCESS,
        "optimizer": torch.optim.Adam,
        "folder": folder,
        "steps": 12,
        "objective": objective,
        "lr": LearningRate(1e-2, warmup=3),
        "batch_size": 16,
        "log_every": 5,
        "save_every": 6,
        "trackers": [],
    }
    return Trainer(**(defaults | options))


def make_level_sampler(resampler, process=PROCESS, parts=1, batch=8, gather=lambda rows: rows):
    return LevelSampler(Objective(resampler=resampler), process, 5, batch, parts, gather)


@pytest.mark.parametrize(
    "process",
    [PROCESS, Process(Discrete(steps=20), time=TimeConditioning(scale=20.0))],
    ids=["continuous", "table"],
)
@pytest.mark.parametrize("resampler", [MOMENT, LEARNED], ids=repr)
def test_the_resampler_learns_from_unweighted_losses_at_the_times_that_were_drawn(
    process, resampler, monkeypatch
):
    updates, update = [], type(resampler).update

    def record(self, learned, times, losses):
        updates.append((times, losses))
        return update(self, learned, times, losses)

    monkeypatch.setattr(type(resampler), "update", record)
    sampler = make_level_sampler(resampler, process)
    drawn = []
    for step in range(12):
        key = SampleKey(5, step, torch.arange(8), 8)
        draw = sampler.objective.draw(process, key, state=sampler.learned)
        times = draw.level.t.flatten()
        drawn.append(times)
        sampler.add(step + 1, ((2 - times) * draw.importance).float())
        assert len(updates) == (step + 1) // 4
    assert (draw.importance != 1).any()
    for period, (times, losses) in enumerate(updates):
        assert torch.equal(times, torch.cat(drawn[4 * period : 4 * period + 4]))
        torch.testing.assert_close(losses, 2 - times, rtol=1e-6, atol=0)


def test_losses_of_all_ranks_are_in_the_order_of_the_global_batch():
    """Rank 0 trains samples 0, 4, then 2, 6, rank 1 the others; a row begins with the norm."""
    ranks = [torch.tensor([[0.0, 0, 4, 2, 6]]), torch.tensor([[0.0, 1, 5, 3, 7]])]
    updates = []

    class RecordingMoment(SecondMoment):
        def update(self, learned, times, losses):
            updates.append(losses)
            return learned

    sampler = make_level_sampler(
        RecordingMoment(bins=2, update_interval=1), parts=2, gather=lambda rows: torch.stack(ranks)
    )
    sampler.add(1, torch.tensor([0.0, 4, 2, 6]))
    assert updates[0].tolist() == list(range(8))


def test_restoring_takes_only_its_tensors_from_a_checkpoint():
    sampler = make_level_sampler(MOMENT)
    sampler.add(1, torch.ones(8))
    stored = sampler.tensors()
    assert stored.keys() == {"resampler.window", "resampler.known", "resampler.losses"}
    tensors = {"other": torch.ones(1), **stored}
    make_level_sampler(MOMENT).restore(tensors)
    assert tensors.keys() == {"other"}


def test_without_a_resampler_nothing_is_stored():
    sampler = make_level_sampler(None)
    sampler.add(1, torch.ones(8))
    assert sampler.learned is None
    assert sampler.tensors() == {}
    sampler.restore({"other": torch.ones(1)})
    assert sampler.learned is None


def test_the_level_of_a_sample_is_known_until_the_resampler_is_updated():
    def key(step):
        return SampleKey(5, step, torch.tensor([3]), 8)

    sampler = make_level_sampler(SecondMoment(bins=2, history=1, update_interval=4))
    logsnr = sampler.logsnr(key(2), 3)
    times = sampler.objective.times(key(2))
    assert float(logsnr) == pytest.approx(float(Cosine().logsnr(times)), abs=1e-3)
    assert sampler.logsnr(key(2), 4).isnan()
    assert not sampler.logsnr(key(4), 5).isnan()
    assert make_level_sampler(None).logsnr(key(2), 400) == logsnr


OBJECTIVES = {
    "second moment": Objective(resampler=MOMENT),
    "learned": Objective(resampler=LEARNED, levels="independent"),
    "uncertainty": Objective(uncertainty=Uncertainty(8)),
    "transport": Objective(coupling=OptimalTransport(4), perturbation=0.1, offset=0.1),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_resumed_run_writes_the_same_bytes(tmp_path, objective):
    """It stops between the updates at steps 4 and 8: the checkpoint holds losses of two steps."""
    straight = make_trainer(tmp_path / "straight", objective).train()
    crash_after(make_trainer(tmp_path / "resumed", objective), 6)
    tensors = read_checkpoint(tmp_path / "resumed", 6)["training.safetensors"]
    if objective.resampler:
        assert tensors["resampler.window"].shape == (2, 17)
        masses = objective.resampler.masses(straight.level_sampler.learned)
        assert masses.max() > 1.01 / len(masses)
    else:
        assert not any(name.startswith("resampler.") for name in tensors)
    make_trainer(tmp_path / "resumed", objective, resume=True).train()
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_the_resampler_of_a_run_learns_at_the_levels_that_the_run_trains(tmp_path, monkeypatch):
    draws, update_times, draw, update = [], [], Objective.draw, SecondMoment.update

    def record_draw(self, *args, **options):
        draws.append(draw(self, *args, **options))
        return draws[-1]

    def record_update(self, state, times, losses):
        update_times.append(times)
        return update(self, state, times, losses)

    monkeypatch.setattr(Objective, "draw", record_draw)
    monkeypatch.setattr(SecondMoment, "update", record_update)
    make_trainer(tmp_path, OBJECTIVES["second moment"]).train()
    trained = torch.cat([drawn.level.t.flatten() for drawn in draws])
    assert torch.equal(torch.cat(update_times), trained)
    assert (draws[-1].importance != 1).all()
    assert (draws[0].importance == 1).all()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_accumulation_does_not_change_what_is_learned(tmp_path, objective):
    whole, parts = (
        make_trainer(tmp_path / str(n), objective, accumulation=n).train() for n in (1, 4)
    )
    for name, value in (whole.level_sampler.learned or {}).items():
        torch.testing.assert_close(parts.level_sampler.learned[name], value, rtol=1e-4, atol=1e-6)
    for name, value in whole.trained.state_dict().items():
        torch.testing.assert_close(parts.trained.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_uncertainty_is_trained_but_is_not_part_of_the_averaged_weights(tmp_path):
    state = make_trainer(tmp_path, OBJECTIVES["uncertainty"]).train()
    names = Net().state_dict().keys()
    assert read_weights(tmp_path / "ema.safetensors").keys() == names
    files = read_checkpoint(tmp_path, 12)
    assert files["ema.safetensors"].keys() == names
    modules = {name.partition(".")[0] for name in files["model.safetensors"]}
    assert modules == {"network", "uncertainty"}
    assert files["model.safetensors"]["uncertainty.linear.weight"].abs().min() > 0
    assert torch.equal(state.uncertainty.frequency, Uncertainty(8).module().frequency)


def test_the_resampler_does_not_learn_from_losses_that_are_not_finite(tmp_path, capsys):
    class DigitsWithOverflow(Digits):
        def __getitem__(self, index):
            x0, label = super().__getitem__(index)
            return (x0 * 3e38 if index == 40 else x0), label

    objective = Objective(resampler=MOMENT, coupling=OptimalTransport(8))
    options = {"data": DigitsWithOverflow(), "process": UNBOUNDED, "steps": 113, "patience": 2}
    trainer = make_trainer(tmp_path, objective, **options)
    state = trainer.train()
    assert "sample 40 of the data at λ = " in capsys.readouterr().err
    assert all(value.isfinite().all() for value in state.level_sampler.learned.values())


def test_groups_of_a_coupling_that_do_not_divide_the_micro_batch_are_refused(tmp_path):
    objective = Objective(coupling=OptimalTransport(8))
    message = (
        "batch_size is 16, expected a multiple of 1 ranks x 4 micro-batches x groups of 8, "
        r"of OptimalTransport\(group=8\)"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", objective, accumulation=4).train()
    assert not (tmp_path / "run").exists()
    make_trainer(tmp_path / "run", objective, accumulation=2, steps=1).train()


RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
sys.path.insert(0, {root!r})
from tests.training.test_level_sampler import OBJECTIVES, make_trainer

torch.set_num_threads(1)
Accelerator.end_training = lambda self: None  # leaves the process group to the second run
for name in ("second moment", "uncertainty"):
    state = make_trainer(Path({folder!r}) / name, OBJECTIVES[name]).train()
    tensors = {{**(state.level_sampler.learned or {{}}), **state.trained.state_dict()}}
    file = f"{{name}} {{state.accelerator.process_index}}.safetensors"
    save_file(tensors, Path({folder!r}) / file)
"""


@pytest.mark.slow
def test_two_ranks_learn_the_same_bits_and_what_one_rank_learns_to_rounding(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT.format(root=os.getcwd(), folder=str(tmp_path)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in ("second moment", "uncertainty"):
        first, second = (load_file(tmp_path / f"{name} {rank}.safetensors") for rank in (0, 1))
        one = make_trainer(tmp_path / f"one {name}", OBJECTIVES[name]).train()
        expected = {**(one.level_sampler.learned or {}), **one.trained.state_dict()}
        assert first.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4)
