"""Sharded runs: they are those of data parallelism and of one rank to rounding, and resume on any
number of ranks and any sharding.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcore.run import Run
from diffcore.training.ranks.sharding import Sharding
from tests.helpers import rank_runs
from tests.helpers.training_runs import LabelRecorder, make_trainer

FULL, HYBRID = {"strategy": "full"}, {"strategy": "hybrid", "group": 2}


def launch(folder, ranks, *cases):
    """Train cases one after the other on some ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(Path(rank_runs.__file__)), str(folder), json.dumps(cases)]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", *script],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def reports(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def seen(folder):
    """The (position, index) that all processes of a run have read, without repetitions."""
    lines = [line for path in folder.glob("seen-*.txt") for line in path.read_text().splitlines()]
    return {tuple(map(int, line.split())) for line in lines}


def assert_equal_runs(run, expected, ema=1e-6):
    """The same losses to 1e-5, the same learning rates and samples, the same averages."""
    one, other = reports(run), reports(expected)
    assert [line["step"] for line in one] == list(range(1, 21))
    assert [line["lr"] for line in one] == [line["lr"] for line in other]
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in lines] for lines in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-5)
    for line, true in zip(one, other, strict=True):
        assert line["loss_by_level"] == pytest.approx(true["loss_by_level"], rel=1e-5, abs=1e-5)
    assert seen(run) == seen(expected)
    files = [
        "ema.safetensors",
        *(f"snapshots/{p.name}" for p in (expected / "snapshots").iterdir()),
    ]
    for file in files:
        found, true = load_file(run / file), load_file(expected / file)
        assert found.keys() == true.keys()
        for name in set(true) - {"training_calls"}:
            torch.testing.assert_close(found[name], true[name], rtol=0, atol=ema)
    held_out = [
        json.loads((path / "validation.jsonl").read_text().splitlines()[-1])
        for path in (run, expected)
    ]
    assert held_out[0]["loss"] == pytest.approx(held_out[1]["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one rank without accumulation."""
    folder = tmp_path_factory.mktemp("single")
    rank_runs.run(folder, "run")
    return folder / "run"


def assert_run_that_shares_weights_equals(run, expected):
    """The numbers of one rank, the previews, and weights that are whole."""
    assert_equal_runs(run, expected)
    previews = ["step-00000010.png", "step-00000020.png"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == previews
    weights = Run(run).denoiser(network=LabelRecorder()).network.state_dict()
    assert weights["image.weight"].shape == (32, 64)


@pytest.mark.thorough
def test_every_number_of_ranks_accumulation_workers_and_sharding(tmp_path, single):
    for ranks in (1, 2, 4):
        shardings = [{}, FULL, *([HYBRID] if ranks == 4 else [])]
        cases = [
            {
                "name": f"{ranks}-{accumulation}-{workers}-{sharding.get('strategy', 'none')}",
                "accumulation": accumulation,
                "workers": workers,
                "sharding": sharding,
                "sample_every": 0,
            }
            for accumulation, workers, sharding in product((1, 2, 4), (0, 2), shardings)
        ]
        launch(tmp_path, ranks, *cases)
        for case in cases:
            assert_equal_runs(tmp_path / case["name"], single)


FUSED = {"optimizer": "fused"}
SHARDED = {"checkpoints": {"format": "sharded"}}
BESIDE = {"checkpoints": {"format": "sharded", "asynchronous": True}}
"""Every rank writes its own part, and training does not wait for it."""


FULL_SHARDED, FULL_BESIDE = {"sharding": FULL} | SHARDED, {"sharding": FULL} | BESIDE
HYBRID_BESIDE = {"sharding": HYBRID} | BESIDE
PASSES = {
    "2 full, 1": ((2, {"sharding": FULL}), (1, {})),
    "2 full, 4 hybrid": ((2, {"sharding": FULL}), (4, {"sharding": HYBRID})),
    "2, 1": ((2, {}), (1, {})),
    "2 full sharded, 4 hybrid beside": ((2, FULL_SHARDED), (4, HYBRID_BESIDE)),
    "2 full sharded, 1": ((2, FULL_SHARDED), (1, {})),
    "1 sharded, 2 full sharded": ((1, SHARDED), (2, FULL_SHARDED)),
    "2 full sharded, 1, fused": ((2, FULL_SHARDED | FUSED), (1, FUSED)),
}
"""Ranks and settings of the run that writes a checkpoint, and of the run that resumes from it."""
FURTHER_PASSES = {
    "4 full, 2": ((4, {"sharding": FULL}), (2, {})),
    "1, 4 full": ((1, {}), (4, {"sharding": FULL})),
    "4 hybrid beside, 2 full sharded": ((4, HYBRID_BESIDE), (2, FULL_SHARDED)),
    "4 full sharded, 2": ((4, FULL_SHARDED), (2, {})),
}


def launch_together(folder, passes, turn, others, **settings):
    """Train the first or second run of all passes and other cases, in one launch for each number
    of ranks.
    """
    cases = {ranks: list(each) for ranks, each in others.items()}
    for name, runs in passes.items():
        ranks, options = runs[turn]
        case = {"name": name, "save_every": 10, "keep": 9} | options | settings
        cases.setdefault(ranks, []).append(case)
    for ranks, each in cases.items():
        if ranks > 1:
            launch(folder, ranks, *each)
        else:
            for case in each:
                rank_runs.run(folder, **case)


def assert_checkpoints_pass(folder, single, passes, first_cases, second_cases):
    """A run that is resumed at step 10 on other ranks equals the run of one rank."""
    launch_together(folder, passes, 0, first_cases)
    for name in passes:
        (folder / name / "checkpoints/step-00000020").rename(folder / name / "checkpoints/kept")
    launch_together(folder, passes, 1, second_cases, resume=True)
    for name in passes:
        assert_equal_runs(folder / name, single)


@pytest.mark.slow
def test_runs_on_several_ranks_and_their_checkpoints_are_those_of_one(tmp_path, single):
    """In one test, because starting the ranks takes longer than their runs."""
    part = {"save_every": 10, "sharding": FULL}
    two = (
        {"name": "full", "sharding": FULL, "accumulation": 2},
        {"name": "fused", "sharding": FULL} | FUSED,
        {"name": "sync"} | part | SHARDED,
        {"name": "beside"} | part | BESIDE,
        {"name": "gathered"} | part,
        {"name": "ranks"},
    )
    four = ({"name": "hybrid", "sharding": HYBRID, "workers": 1},)
    assert_checkpoints_pass(tmp_path, single, PASSES, {2: two}, {4: four})
    assert_run_that_shares_weights_equals(tmp_path / "full", single)
    assert_run_that_shares_weights_equals(tmp_path / "hybrid", single)
    assert_run_that_shares_weights_equals(tmp_path / "fused", single)
    assert_every_rank_has_written_its_own_part(tmp_path)
    assert_gradient_noise_of_two_ranks_is_that_of_two_micro_batches(tmp_path)


@pytest.mark.thorough
def test_checkpoints_pass_between_further_ranks_and_shardings(tmp_path, single):
    assert_checkpoints_pass(tmp_path, single, FURTHER_PASSES, {}, {})


def assert_every_rank_has_written_its_own_part(folder):
    run = Run(folder / "sync")
    written = run.checkpoints / "step-00000020"
    sizes = {path.name: path.stat().st_size for path in written.glob("*.safetensors")}
    for part in ("model", "ema", "ema-0.1000", "training"):
        whole = folder / "gathered/checkpoints/step-00000020" / f"{part}.safetensors"
        for rank in (0, 1):
            assert sizes.pop(f"{part}.rank-{rank:05d}.safetensors") < 0.6 * whole.stat().st_size
    assert sizes == {}
    beside = Run(folder / "beside").checkpoints / "step-00000020"
    for path in written.iterdir():
        if path.suffix == ".safetensors":  # the manifest differs by the settings of the run
            assert path.read_bytes() == (beside / path.name).read_bytes()
    for name, file in (("averaged", "ema"), ("raw", "model")):
        found = run.read_weights(f"step-00000020/{name}").tensors
        whole = load_file(folder / f"gathered/checkpoints/step-00000020/{file}.safetensors")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], value) for key, value in whole.items())


def assert_gradient_noise_of_two_ranks_is_that_of_two_micro_batches(folder):
    """Ranks that share weights have no gradients of their own, and report none."""
    rank_runs.run(folder, "parts", accumulation=2)
    for found, true in zip(*(reports(folder / name) for name in ("ranks", "parts")), strict=True):
        for name in ("grad_variance", "grad_square"):
            assert found[name] == pytest.approx(true[name], rel=1e-3, abs=1e-5)
    assert not any("noise_scale" in line for line in reports(folder / "gathered"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "some"}, "sharding.strategy is 'some'"),
        ({"strategy": "full", "group": 2}, "sharding.group is 2 with strategy full"),
        ({"strategy": "hybrid", "group": -1}, "sharding.group is -1"),
    ],
)
def test_settings_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sharding(**options)


def test_ranks_that_form_no_groups_are_refused():
    with pytest.raises(ValueError, match="a divisor of the 4 ranks"):
        Sharding("hybrid", group=3).mesh(4, "cpu")


def test_one_rank_has_nothing_to_share(tmp_path):
    state = make_trainer(tmp_path, sharding=Sharding("full"), steps=1).train()
    assert not state.is_sharded
