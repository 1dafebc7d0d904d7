"""Training of several networks: each by its own loss, in the checkpoint, equal for every split."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from diffcore.doctor.resources import check_resources
from diffcore.doctor.training import check_training
from diffcore.objectives.networks import Networks, TrainedNetwork
from diffcore.objectives.objective import Objective
from diffcore.run import Run
from diffcore.training.checkpoints.checkpoint import Checkpoints
from diffcore.training.construction import build_accelerator, build_state
from diffcore.training.data import Digits
from diffcore.training.further_networks import build_further_networks
from diffcore.training.loop import advance, training_batches
from diffcore.training.optimization.gradients import frozen
from diffcore.training.ranks.sharding import Sharding
from diffcore.training.reports.validation import Validation
from tests.helpers import rank_runs
from tests.helpers.further_networks import Critic, ThreeNetworks
from tests.helpers.training_runs import (
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    read_reports,
    refused_run,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
THREE = {"objective": ThreeNetworks(dropout=0.1), "network": partial(LabelRecorder, dropout=0.2)}
FILES = {"fake.safetensors", "fake-training.safetensors"}
FILES |= {name.replace("fake", "critic") for name in FILES}


def test_every_network_is_trained_and_saved_in_files_of_its_own(tmp_path):
    state = train(tmp_path, **THREE, save_every=3)
    before, after = read_checkpoint(tmp_path, 3), read_checkpoint(tmp_path)
    assert (
        before.keys()
        == after.keys()
        == FILES
        | {
            "model.safetensors",
            "ema.safetensors",
            "training.safetensors",
        }
    )
    for file in (*FILES, "model.safetensors"):
        changed = {n for n, value in after[file].items() if not value.equal(before[file][n])}
        assert changed == after[file].keys() - {"norm.running_var"} | (
            {"norm.running_var"} if "norm.running_var" in after[file] else set()
        ), file
    for name, module in {"fake": LabelRecorder(), "critic": Critic()}.items():
        module.load_state_dict(after[f"{name}.safetensors"])
        for key, value in state.networks.module(name).state_dict().items():
            assert value.equal(module.state_dict()[key])
    (line, *_), last = read_reports(tmp_path), read_reports(tmp_path)[-1]
    assert {"loss/fake", "grad_norm/fake", "lr/fake", "loss/critic"} <= line.keys()
    assert last["lr/fake"] == last["lr"]
    assert last["lr/critic"] == pytest.approx(1e-3 * (1 + 5 / 6))
    assert Run(tmp_path).denoiser(network=LabelRecorder()) is not None


def test_a_network_is_updated_as_often_as_it_says_before_that_of_the_run(tmp_path):
    counts = {}
    for updates in (1, 3):
        state = train(tmp_path / str(updates), objective=ThreeNetworks(updates=updates), steps=4)
        counts[updates] = int(state.networks.module("fake").training_calls)
        assert int(state.network.training_calls) == 4
        (step,) = {int(values["step"]) for values in state.further["fake"].optimizer.state.values()}
        assert step == 4 * updates
    assert counts == {1: 4, 3: 12}


def test_the_loss_of_one_network_leaves_the_others_as_they_are(tmp_path):
    """Also without an optimizer step: no gradient, no change of buffers, no change of mode."""
    state = build_state(make_trainer(tmp_path, **THREE))
    batch = next(training_batches(state, 1))
    student, (fake, critic) = state.modules, state.further_modules()
    cases = [
        (student, [fake, critic], lambda: state.losses(batch, draw)),
        (fake, [student, critic], lambda: state.network_losses("fake", batch, 1)),
        (critic, [student, fake], lambda: state.network_losses("critic", batch, 1)),
    ]
    draw = state.draw(batch, state.sample_key(0, batch.batch_index))
    for own, others, losses in cases:
        before = [value.clone() for module in others for value in module.state_dict().values()]
        with frozen(others):
            losses().mean().backward()
        after = [value for module in others for value in module.state_dict().values()]
        assert all(map(torch.equal, before, after))
        grads = [[p.grad is not None for p in module.parameters()] for module in (own, *others)]
        assert all(grads[0])
        assert not any(grads[1] + grads[2])
        assert all(p.requires_grad for module in others for p in module.parameters())
        assert all(each.training for module in (own, *others) for each in module.modules())
        own.zero_grad()
    assert not any(p.requires_grad for p in state.networks.teacher.network.parameters())


@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_a_resumed_run_of_three_networks_writes_the_same_bytes(tmp_path, form):
    options = THREE | {"checkpoints": Checkpoints(form), "save_every": 2, "log_every": 4}
    train(tmp_path / "straight", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), 4)
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_accumulation_changes_no_network_but_for_rounding(tmp_path):
    options = {"objective": ThreeNetworks(), "clip": 0.5}
    for name, accumulation in {"whole": 1, "parts": 4}.items():
        train(tmp_path / name, accumulation=accumulation, **options)
    assert_equal_losses(tmp_path / "parts", tmp_path / "whole")
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for file in ("fake.safetensors", "model.safetensors"):
        for name in whole[file].keys() - {"training_calls"}:
            torch.testing.assert_close(parts[file][name], whole[file][name], rtol=1e-4, atol=1e-6)
    mean = "logits.mean"
    found = parts["critic.safetensors"][mean], whole["critic.safetensors"][mean]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)
    assert found[1] != 0


def assert_equal_losses(run, expected, steps=5, count=3):
    """The first losses of all networks agree to 1e-5."""
    for line, true in list(zip(read_reports(run), read_reports(expected), strict=True))[:steps]:
        names = [name for name in true if name.startswith("loss") and name != "loss_by_level"]
        assert len(names) == count
        for name in names:
            assert line[name] == pytest.approx(true[name], rel=1e-5, abs=1e-5), name


def test_the_seed_of_each_network_and_update_is_its_own(tmp_path):
    """Equal noise in all updates of a step would make them one update with a larger step."""
    state, keys = build_state(make_trainer(tmp_path, **THREE)), []
    draw = type(state).draw

    def recorded(self, batch, key):
        keys.append((key.seed, key.step))
        return draw(self, batch, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state), "draw", recorded)
        batches = training_batches(state, 2)
        advance(state, batches)
        advance(state, batches)
    assert len(set(keys)) == len(keys) == 2 * (2 + 1 + 1)


def test_a_loss_of_a_further_network_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    objective = ThreeNetworks(faulty=2)
    state, text = refused_run(
        make_trainer(tmp_path, **THREE | {"objective": objective}, patience=3), "3 steps in a row"
    )
    assert "step 4, network critic: loss inf, gradient norm nan" in text
    assert state.step == 5
    for value in state.networks.module("critic").state_dict().values():
        assert value.isfinite().all()
    lines = read_reports(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["loss/critic"] is None for line in lines] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ema"}, "a further network is named 'ema', expected an identifier other than"),
        ({"name": "a-b"}, "a further network is named 'a-b', expected an identifier"),
        ({"half": True}, "torch.bfloat16, in which small updates are lost"),
        ({"empty": True}, "the further network critic has no parameters that require"),
        ({"frozen": True}, "the further network critic has no parameters that require"),
    ],
    ids=repr,
)
def test_a_further_network_that_cannot_be_stored_or_trained_is_refused(tmp_path, options, message):
    class One(Objective):
        def networks(self, denoiser, device, label_wrapper):
            module = nn.Linear(1, 1)
            module = module.bfloat16() if options.get("half") else module
            module = nn.Identity() if options.get("empty") else module
            module.requires_grad_(not options.get("frozen"))
            return Networks(None, {options.get("name", "critic"): TrainedNetwork(module)})

    with pytest.raises(ValueError, match=message):
        build_state(make_trainer(tmp_path, objective=One()))


def test_a_network_of_which_nothing_is_trained_is_refused(tmp_path):
    def frozen():
        return LabelRecorder().requires_grad_(False)

    with pytest.raises(ValueError, match="the network has no parameters that require a gradient"):
        build_state(make_trainer(tmp_path, network=frozen))


def test_gathered_parameters_are_not_kept_with_further_networks(tmp_path, monkeypatch):
    settings = make_trainer(tmp_path, **THREE, sharding=Sharding("full", reshard=False))
    accelerator = build_accelerator(settings)
    monkeypatch.setattr(Sharding, "mesh", lambda *_: object())
    networks = Networks(None, {"fake": TrainedNetwork(nn.Linear(1, 1))})
    with pytest.raises(ValueError, match=r"further networks \(fake\).*leave reshard true"):
        build_further_networks(settings, accelerator, networks)


def test_updates_below_1_are_refused():
    with pytest.raises(ValueError, match="updates is 0, expected at least 1"):
        TrainedNetwork(nn.Linear(1, 1), updates=0)


def test_an_optimizer_that_averages_is_refused_for_a_further_network(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match="optimizer of the further network fake is AdamWSchedule"):
        build_state(make_trainer(tmp_path, **THREE, optimizer=schedulefree.AdamWScheduleFree))


def test_a_surrogate_loss_is_not_measured_on_held_out_data(tmp_path):
    with pytest.raises(ValueError, match="only the gradient of the loss of ThreeNetworks has a"):
        make_trainer(tmp_path, **THREE, validation=Validation(Digits("test")))


def test_a_run_is_not_resumed_with_another_teacher(tmp_path, monkeypatch):
    train(tmp_path, **THREE, steps=2)

    other = ThreeNetworks(dropout=0.1)
    monkeypatch.setattr(ThreeNetworks, "content_hash", "another")
    with pytest.raises(ValueError, match="the teacher are not those with which the run"):
        train(tmp_path, **THREE | {"objective": other}, steps=3, resume=True)


def test_the_doctor_counts_the_memory_of_all_networks(tmp_path):
    settings = make_trainer(tmp_path, **THREE)
    findings, state, timing = check_training(settings)
    memory, disk = check_resources(settings, state, timing)[:2]
    (overfit,) = (each for each in findings if each.name == "overfit one batch")
    assert "only the gradient of ThreeNetworks has a meaning" in overfit.text
    fake, critic = (
        sum(p.numel() for p in state.networks.module(name).parameters())
        for name in ("fake", "critic")
    )
    expected = 16 * (fake + critic)  # weight, gradient, and two numbers of the optimizer
    assert memory.values["further networks"] == pytest.approx(expected, rel=0.02)
    assert memory.values["teacher"] == pytest.approx(4 * fake, rel=0.01)
    assert "teacher" in memory.text
    alone = make_trainer(tmp_path)
    _, state, timing = check_training(alone)
    single = check_resources(alone, state, timing)[1]
    assert disk.values["checkpoint"] - single.values["checkpoint"] == pytest.approx(
        12 * (fake + critic), rel=0.02
    )


NETWORKS = {"three": 3, "matching": 3, "averaged": 1}
"""Objective of `rank_runs` -> the number of its losses."""


@pytest.mark.slow
def test_ranks_accumulation_and_sharding_change_no_network_but_for_rounding(tmp_path):
    """In one launch, because starting the ranks takes longer than their runs."""
    cases = []
    full = {"sharding": {"strategy": "full"}, "checkpoints": {"format": "sharded"}}
    for name in NETWORKS:
        case = {"objective": name, "steps": 5, "sample_every": 0}
        rank_runs.run(tmp_path, f"{name}-one", **case)
        for kind, options in {"ranks": {"accumulation": 2}, "full": full}.items():
            resumed = case | options | {"name": f"{name}-{kind}-resumed"}
            cases += [case | options | {"name": f"{name}-{kind}"}]
            cases += [resumed | {"steps": 3}, resumed | {"resume": True}]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(rank_runs.__file__), str(tmp_path), json.dumps(cases)),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, count in NETWORKS.items():
        for kind in ("ranks", "full"):
            run, resumed = (tmp_path / f"{name}-{kind}{end}" for end in ("", "-resumed"))
            assert_equal_losses(run, tmp_path / f"{name}-one", count=count)
            first, second = (hashes(folder / "checkpoints") for folder in (run, resumed))
            assert first["step-00000005/manifest.json"] == second["step-00000005/manifest.json"]
    written = tmp_path / "three-full/checkpoints/step-00000005"
    whole = tmp_path / "three-ranks/checkpoints/step-00000005/fake.safetensors"
    for rank in (0, 1):  # each rank holds a half
        part = written / f"fake.rank-{rank:05d}.safetensors"
        assert part.stat().st_size < 0.6 * whole.stat().st_size
