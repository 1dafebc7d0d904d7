"""What the objective learns in a run: from the right losses at the right times, on every rank the same, resumed bit for bit."""

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
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.objective import Objective, SampleKey
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.schedules import Cosine, Discrete
from diffcore.training import checkpoint
from diffcore.training.data import Digits
from diffcore.training.level_sampler import LevelSampler
from diffcore.training.lr import LearningRate
from diffcore.training.trainer import Trainer
from tests.helpers.training_runs import crash_after, hashes

pytestmark = pytest.mark.usefixtures("one_thread")
MOMENT = SecondMoment(bins=4, history=2, every=4)
LEARNED = LearnedSchedule(bins=6, every=4)
PROCESS = Process(shape=(1, 8, 8))


class Net(nn.Module):
    """A perceptron that is told the level."""

    def __init__(self):
        super().__init__()
        self.time, self.first, self.last = nn.Linear(1, 16), nn.Linear(64, 16), nn.Linear(16, 64)

    def forward(self, x, time):
        hidden = self.first(x.flatten(1)) + self.time(time[:, None] / 1000)
        return self.last(nn.functional.silu(hidden)).view_as(x)


def trainer(folder, objective, **options):
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


# Learning ------------------------------------------------------------------------------------------------------------


def adaptation(resampler, process=PROCESS, parts=1, batch=8, gather=lambda rows: rows):
    return LevelSampler(Objective(resampler=resampler), process, 5, batch, parts, gather)


@pytest.mark.parametrize(
    "process",
    [PROCESS, Process(Discrete(steps=20), time=TimeConditioning(scale=20.0))],
    ids=["continuous", "table"],
)
@pytest.mark.parametrize("resampler", [MOMENT, LEARNED], ids=repr)
def test_it_learns_from_each_loss_at_its_own_time_and_without_the_importance(
    process, resampler, monkeypatch
):
    seen, update = [], type(resampler).update

    def spy(self, learned, times, losses):
        seen.append((times, losses))
        return update(self, learned, times, losses)

    monkeypatch.setattr(type(resampler), "update", spy)
    made = adaptation(resampler, process)
    trained = []
    for step in range(12):
        draw = made.objective.draw(
            process, SampleKey(5, step, torch.arange(8), 8), learned=made.learned
        )
        times = draw.level.t.flatten()
        trained.append(times)
        made.add(step + 1, ((2 - times) * draw.importance).float())
        assert len(seen) == (step + 1) // 4
    assert (draw.importance != 1).any()
    for period, (times, losses) in enumerate(seen):
        assert torch.equal(times, torch.cat(trained[4 * period : 4 * period + 4]))
        torch.testing.assert_close(losses, 2 - times, rtol=1e-6, atol=0)


def test_losses_of_ranks_and_parts_are_put_in_their_places():
    """Two ranks, two parts: a rank's row is part after part; in the global batch a part holds rank after rank."""
    ranks = [torch.tensor([[0.0, 0, 1, 4, 5]]), torch.tensor([[0.0, 2, 3, 6, 7]])]
    made = adaptation(
        SecondMoment(bins=2, every=1), parts=2, gather=lambda rows: torch.stack(ranks)
    )
    seen = []
    object.__setattr__(
        made.objective.resampler,
        "update",
        lambda learned, times, losses: seen.append(losses) or learned,
    )
    made.add(1, torch.tensor([0.0, 1, 4, 5]))
    assert seen[0].tolist() == list(range(8))


def test_a_checkpoints_other_tensors_are_left():
    made = adaptation(MOMENT)
    made.add(1, torch.ones(8))
    kept = made.tensors()
    both = {"other": torch.ones(1), **kept}
    adaptation(MOMENT).restore(both)
    assert both.keys() == {"other"}
    assert kept.keys() == {"resampler.window", "resampler.losses"}


def test_without_a_resampler_nothing_is_kept():
    made = adaptation(None)
    made.add(1, torch.ones(8))
    assert made.learned is None
    assert made.tensors() == {}
    made.restore({"other": torch.ones(1)})
    assert made.learned is None


def test_the_level_of_a_sample_is_told_as_long_as_it_is_known():
    made = adaptation(SecondMoment(bins=2, history=1, every=4))
    named = made.describe(SampleKey(5, 2, torch.tensor([3]), 8), 3)
    times = made.objective.times(SampleKey(5, 2, torch.tensor([3]), 8))
    assert float(named) == pytest.approx(float(Cosine().logsnr(times)), abs=1e-3)
    assert made.describe(SampleKey(5, 2, torch.tensor([3]), 8), 4) == UNKNOWN
    assert made.describe(SampleKey(5, 4, torch.tensor([3]), 8), 5) != UNKNOWN
    assert adaptation(None).describe(SampleKey(5, 2, torch.tensor([3]), 8), 400) == named


# A run ---------------------------------------------------------------------------------------------------------------

UNKNOWN = "unknown (the level sampler has been updated since)"
OBJECTIVES = {
    "second moment": Objective(resampler=MOMENT),
    "learned": Objective(resampler=LEARNED, levels="independent"),
    "uncertainty": Objective(uncertainty=Uncertainty(8)),
    "transport": Objective(coupling=OptimalTransport(4), perturbation=0.1, offset=0.1),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_resumed_run_is_the_same_run(tmp_path, objective, monkeypatch):
    """Stopped at step 6, between two updates at 4 and 8: two steps of losses wait in the checkpoint."""
    straight = trainer(tmp_path / "straight", objective).train()
    crash_after(trainer(tmp_path / "resumed", objective), 6, monkeypatch)
    state = checkpoint.read(max((tmp_path / "resumed/checkpoints").iterdir())).tensors[
        "training.safetensors"
    ]
    if objective.resampler:
        assert state["resampler.window"].shape == (2, 17)
        masses = objective.resampler.masses(straight.level_sampler.learned)
        assert masses.max() > 1.01 / len(masses)
    else:
        assert not any(name.startswith("resampler.") for name in state)
    trainer(tmp_path / "resumed", objective, resume=True).train()
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_a_run_is_trained_at_the_levels_that_it_learns_from(tmp_path, monkeypatch):
    drawn, learned, draw, update = [], [], Objective.draw, SecondMoment.update

    def spy_draw(self, *args, **options):
        drawn.append(draw(self, *args, **options))
        return drawn[-1]

    def spy_update(self, state, times, losses):
        learned.append(times)
        return update(self, state, times, losses)

    monkeypatch.setattr(Objective, "draw", spy_draw)
    monkeypatch.setattr(SecondMoment, "update", spy_update)
    trainer(tmp_path, OBJECTIVES["second moment"]).train()
    assert torch.equal(torch.cat(learned), torch.cat([made.level.t.flatten() for made in drawn]))
    assert (drawn[-1].importance != 1).all()
    assert (drawn[0].importance == 1).all()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_accumulation_learns_the_same(tmp_path, objective):
    whole, parts = (trainer(tmp_path / str(n), objective, accumulation=n).train() for n in (1, 4))
    for name, value in (whole.level_sampler.learned or {}).items():
        torch.testing.assert_close(parts.level_sampler.learned[name], value, rtol=1e-4, atol=1e-6)
    for name, value in whole.trained.state_dict().items():
        torch.testing.assert_close(parts.trained.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_uncertainty_is_trained_and_kept_apart_from_the_weights(tmp_path):
    made = trainer(tmp_path, OBJECTIVES["uncertainty"]).train()
    assert read_weights(tmp_path / "ema.safetensors").keys() == Net().state_dict().keys()
    files = checkpoint.read(max((tmp_path / "checkpoints").iterdir())).tensors
    assert files["ema.safetensors"].keys() == Net().state_dict().keys()
    assert {name.partition(".")[0] for name in files["model.safetensors"]} == {
        "network",
        "uncertainty",
    }
    assert files["model.safetensors"]["uncertainty.linear.weight"].abs().min() > 0
    assert torch.equal(made.uncertainty.frequency, Uncertainty(8).module().frequency)


def test_losses_that_are_not_finite_teach_nothing_and_stop_the_run(tmp_path, capsys):
    class Broken(Digits):
        def __getitem__(self, index):
            x0, label = super().__getitem__(index)
            return (x0 * math.nan if index == 40 else x0), label

    made = trainer(
        tmp_path,
        Objective(resampler=MOMENT, coupling=OptimalTransport(8)),
        data=Broken(),
        steps=113,
        patience=2,
    ).train()
    assert "sample 40 of the data at λ = " in capsys.readouterr().err
    assert all(value.isfinite().all() for value in made.level_sampler.learned.values())


def test_groups_that_do_not_divide_the_micro_batch_are_refused_before_the_run_begins(tmp_path):
    objective = Objective(coupling=OptimalTransport(8))
    message = (
        "batch_size is 16, expected a multiple of 1 ranks x 4 micro-batches x groups of 8, "
        r"of OptimalTransport\(group=8\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", objective, accumulation=4).train()
    assert not (tmp_path / "run").exists()
    trainer(tmp_path / "run", objective, accumulation=2, steps=1).train()


RANK = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
sys.path.insert(0, {root!r})
from tests.training.test_level_sampler import OBJECTIVES, trainer

torch.set_num_threads(1)
Accelerator.end_training = lambda self: None  # leaves the process group to the second run
for name in ("second moment", "uncertainty"):
    made = trainer(Path({folder!r}) / name, OBJECTIVES[name]).train()
    state = {{**(made.level_sampler.learned or {{}}), **made.trained.state_dict()}}
    save_file(state, Path({folder!r}) / f"{{name}} {{made.accelerator.process_index}}.safetensors")
"""


def test_two_ranks_learn_the_same_and_what_one_learns(tmp_path):
    """Bit for bit the same on both, and but for rounding what one process learns."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(root=os.getcwd(), folder=str(tmp_path)))
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
        alone = trainer(tmp_path / f"alone {name}", OBJECTIVES[name]).train()
        state = {**(alone.level_sampler.learned or {}), **alone.trained.state_dict()}
        assert state.keys() == first.keys()
        for key, value in state.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4)
