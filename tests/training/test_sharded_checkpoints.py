"""Checkpoints of which each rank writes its part, and saving beside the training."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffcore.io.files import CorruptFileError, WriteError
from diffcore.io.manifest import empty_tensors, load_shards, read_manifest
from diffcore.io.plain_data import hash_data
from diffcore.run import Run, read_checkpoint_weights
from diffcore.training import loop
from diffcore.training.averages.power_ema import Snapshots
from diffcore.training.checkpoints import checkpoint, sharded
from diffcore.training.checkpoints.checkpoint import Checkpoints
from diffcore.training.checkpoints.sharded import flatten_parts, plan_shards, write_shards
from diffcore.training.optimization.lr import LearningRate
from tests.helpers.training_runs import LabelRecorder, hashes, read_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = [Checkpoints("sharded"), Checkpoints("gathered", True), Checkpoints("sharded", True)]
OPTIONS = {"steps": 4, "save_every": 2, "keep": 9, "log_every": 3, "snapshots": Snapshots((0.1,))}
NEWEST, OLDER = "checkpoints/step-00000004", "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of four steps, by the settings of their checkpoints."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    for index, settings in enumerate((Checkpoints(), *FORMATS)):
        train(folder / str(index), checkpoints=settings, **OPTIONS)
    torch.set_num_threads(threads)
    return {
        settings: folder / str(index) for index, settings in enumerate((Checkpoints(), *FORMATS))
    }


def copy_without_newest(run, folder):
    """A copy of a run as it was before its last checkpoint and its outputs."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / NEWEST)
    (folder / "ema.safetensors").unlink()
    (folder / "checkpoints/outputs.json").unlink()
    return folder


@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_saving_beside_the_training_writes_the_same_bytes(runs, form):
    expected, found = hashes(runs[Checkpoints(form)]), hashes(runs[Checkpoints(form, True)])
    assert found == expected


def test_a_sharded_checkpoint_holds_the_tensors_of_a_gathered_one(runs):
    folder = runs[Checkpoints("sharded")] / NEWEST
    tensors = empty_tensors(folder, "")
    load_shards(folder, tensors)
    expected = {
        f"{file.removesuffix('.safetensors')}/{name}": value
        for file, part in read_checkpoint(runs[Checkpoints()], 4).items()
        for name, value in part.items()
    }
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():  # a window may hold NaN
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0, equal_nan=True)
    files = {
        f"{part}.rank-00000.safetensors" for part in ("model", "ema", "ema-0.1000", "training")
    }
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}


@pytest.mark.parametrize(
    "first, then",
    [("sharded", "sharded"), ("sharded", "gathered"), ("gathered", "sharded")],
)
def test_a_run_resumes_from_either_format_bit_for_bit(tmp_path, runs, first, then):
    run = copy_without_newest(runs[Checkpoints(first)], tmp_path / "run")
    train(run, checkpoints=Checkpoints(then), resume=True, **OPTIONS)
    found, expected = hashes(run), hashes(runs[Checkpoints(then)])
    same = [name for name in expected if not name.startswith(OLDER)]
    assert {name: found.get(name) for name in same} == {name: expected[name] for name in same}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_other_optimizers_resume_from_shards(tmp_path, optimizer):
    """SGD has no state, and Adagrad has one before its first step."""
    options = OPTIONS | {"optimizer": optimizer, "checkpoints": Checkpoints("sharded")}
    train(tmp_path / "straight", **options)
    run = copy_without_newest(tmp_path / "straight", tmp_path / "run")
    train(run, resume=True, **options)
    assert hashes(run) == hashes(tmp_path / "straight")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "is not what was written": lambda folder: flip(folder / "ema.rank-00000.safetensors"),
    "is missing": lambda folder: (folder / "training.rank-00000.safetensors").unlink(),
    "is truncated or padded": lambda folder: os.truncate(
        folder / "model.rank-00000.safetensors", 99
    ),
    "is no file of this checkpoint": lambda folder: shutil.copy(
        folder / "model.rank-00000.safetensors", folder / "model.rank-00001.safetensors"
    ),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_torn_sharded_checkpoint_is_refused_and_the_one_before_it_is_used(
    tmp_path, runs, message
):
    run = tmp_path / "run"
    shutil.copytree(runs[Checkpoints("sharded")], run)
    DAMAGES[message](run / NEWEST)
    with pytest.raises(CorruptFileError, match=message):
        checkpoint.read(run / NEWEST)
    lines = []
    assert checkpoint.newest(run / "checkpoints", lines.append).state["step"] == 2
    assert lines[0].endswith("going back to the checkpoint before it")


def rewrite(folder, offsets):
    """Change the offsets in a file's header, and the manifest as a forger would."""
    path = folder / "ema.rank-00000.safetensors"
    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    info["ema/image.weight"] = {"saved_offsets": offsets}
    data = save(load_file(path), {"DCP_SHARDING_INFO": json.dumps(info)})
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"][path.name] = {"bytes": len(data), "sha256": digest}
    content = manifest | {"sha256": hash_data(manifest)}
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("offsets", [[32, 0], [1 << 50, 0], [0], "none", None, [-1, 0]])
def test_shards_that_do_not_fill_their_tensor_are_refused(tmp_path, runs, offsets):
    """The reader would return what the memory held before."""
    folder = tmp_path / "step-00000004"
    shutil.copytree(runs[Checkpoints("sharded")] / NEWEST, folder)
    rewrite(folder, offsets)
    with pytest.raises(CorruptFileError, match="step-00000004"):
        read_checkpoint_weights(folder)


def test_weights_are_read_from_the_newest_checkpoint_until_the_end_of_a_run(tmp_path, runs):
    for settings in (Checkpoints("sharded"), Checkpoints("gathered", True)):
        run = Run(copy_without_newest(runs[settings], tmp_path / settings.format))
        assert run.weight_names() == ["averaged", "raw", "step-00000002"]
        assert run.resolve_weights() == "step-00000002"
        for name, part in (("averaged", "ema"), ("raw", "model")):
            expected = read_checkpoint(runs[Checkpoints()], 2)[f"{part}.safetensors"]
            network = run.denoiser(network=LabelRecorder(), weights=name).network
            found = network.state_dict()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    finished = Run(runs[Checkpoints("sharded")])
    assert finished.resolve_weights() == "averaged"
    shutil.copy(finished.weights, run.weights)  # of a later step than any checkpoint
    assert run.resolve_weights() == "averaged"
    shutil.copytree(finished.folder / NEWEST, run.checkpoints / "step-00000005")
    assert run.resolve_weights() == "step-00000005"
    assert run.resolve_weights("raw") == "raw"


def test_a_run_begins_from_the_weights_of_a_sharded_checkpoint(tmp_path, runs):
    source = runs[Checkpoints("sharded")] / OLDER
    still = {"steps": 1, "lr": LearningRate(1e-30)}
    train(tmp_path, init=str(source), **still)
    found = Run(tmp_path).read_weights("raw").tensors
    expected = read_checkpoint(runs[Checkpoints()], 2)["ema.safetensors"]
    for name in set(expected) - {"training_calls"}:
        torch.testing.assert_close(found[name], expected[name])


@pytest.fixture
def held_write(monkeypatch):
    """Hold the write of the checkpoint of step 2 until step 3 is taken; count what happened."""
    module_write, advance, step_3 = checkpoint.write_manifest, loop.advance, threading.Event()
    events = []

    def write_manifest(folder, manifest):
        if manifest["state"]["step"] == 2:
            assert step_3.wait(120)
        module_write(folder, manifest)
        events.append(f"written {manifest['state']['step']}")

    def advance_and_release(state, batches):
        advance(state, batches)
        state.held_out_losses.append(0.5)
        events.append(f"step {state.step}")
        if state.step == 3:
            step_3.set()

    monkeypatch.setattr(checkpoint, "write_manifest", write_manifest)
    monkeypatch.setattr(sharded, "write_manifest", write_manifest)
    monkeypatch.setattr(loop, "advance", advance_and_release)
    return events


@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_training_continues_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path, runs, held_write, form
):
    train(tmp_path, checkpoints=Checkpoints(form, True), **OPTIONS)
    assert held_write.index("step 3") < held_write.index("written 2")
    assert held_write.index("written 2") < held_write.index("written 4")
    assert checkpoint.read(tmp_path / "checkpoints/step-00000002").state["held_out"] == [0.5] * 2


@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_an_error_of_the_writer_ends_the_run_and_keeps_the_older_checkpoints(
    tmp_path, monkeypatch, form
):
    failed = threading.Event()

    def fail(folder, manifest):
        if manifest["state"]["step"] == 4:
            failed.set()
            raise OSError(28, "No space left on device")
        write_manifest(folder, manifest)

    def advance_after_failure(state, batches):
        assert state.step != 5 or failed.wait(120)
        taken.append(state.step)
        advance(state, batches)

    write_manifest, advance, taken = checkpoint.write_manifest, loop.advance, []
    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    monkeypatch.setattr(sharded, "write_manifest", fail)
    monkeypatch.setattr(loop, "advance", advance_after_failure)
    options = OPTIONS | {"steps": 50}
    message = r"step-00000004 cannot be written \(No space left on device.*: step-00000002\)"
    with pytest.raises(WriteError, match=message):
        train(tmp_path, checkpoints=Checkpoints(form, True), **options)
    assert taken[-1] <= 7  # not more than the step before the next checkpoint
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_signal_waits_for_the_checkpoint(tmp_path, monkeypatch):
    advance = loop.advance

    def advance_and_signal(state, batches):
        advance(state, batches)
        if state.step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "advance", advance_and_signal)
    with pytest.raises(SystemExit):
        train(tmp_path, checkpoints=Checkpoints("sharded", True), **OPTIONS)
    assert checkpoint.read(tmp_path / "checkpoints/step-00000001").state["step"] == 1
    assert not (tmp_path / "ema.safetensors").exists()


@pytest.fixture
def group(tmp_path):
    """A process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def test_sharded_parameters_are_written_and_read_whole(tmp_path, group):
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    expected = {f"model/{name}": value.clone() for name, value in network.state_dict().items()}
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    tensors = flatten_parts({"model.safetensors": network.state_dict()})
    assert all(isinstance(value, DTensor) for value in tensors.values())
    folder = tmp_path / "step-00000001"
    shards = plan_shards(tensors, group)
    write_shards(folder, shards, {"step": 1}, group)
    assert checkpoint.read(folder).state == {"step": 1}
    whole = empty_tensors(folder, "model/")
    load_shards(folder, whole)
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    load_shards(folder, tensors, is_single=False)
    for name, value in network.state_dict().items():
        assert torch.equal(value.full_tensor(), expected[f"model/{name}"])


def test_every_rank_learns_which_one_could_not_write(tmp_path, group):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot be written \(rank 0: .*whole checkpoints: none"):
        write_shards(tmp_path / "file/step-00000001", {}, {"step": 1}, group)


def test_the_manifest_of_a_sharded_checkpoint_names_its_format(runs):
    assert read_manifest(runs[Checkpoints("sharded")] / NEWEST)["format"] == "sharded"
    assert "format" not in read_manifest(runs[Checkpoints()] / NEWEST)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"checkpoints\.format is 'pickled', expected gathered or"):
        Checkpoints("pickled")


KILLED = """
import os, signal, sys
from pathlib import Path

from diffcore.training.checkpoints import checkpoint
from diffcore.training.checkpoints.checkpoint import Checkpoints
from tests.helpers.training_runs import train

def write_half_and_die(path, data):
    if path.parent.name.startswith(".step-00000004") and path.name.startswith("training"):
        path.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write_and_sync(path, data)

write_and_sync = checkpoint.write_and_sync
checkpoint.write_and_sync = write_half_and_die
train(Path(sys.argv[1]), steps=50, save_every=2, checkpoints=Checkpoints(sys.argv[2], True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_a_kill_while_a_checkpoint_is_written_beside_the_training_keeps_the_older_one(
    tmp_path, form
):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = tmp_path / "run"
    words = [sys.executable, "-c", KILLED, str(run), form]
    ended = subprocess.run(words, env=environment, cwd=root, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    names = {
        path.name.partition(".step")[1] or path.name for path in (run / "checkpoints").iterdir()
    }
    assert names == {".step", "step-00000002"}
    assert checkpoint.newest(run / "checkpoints", pytest.fail).state["step"] == 2
    options = {"steps": 4, "save_every": 2, "checkpoints": Checkpoints(form, True)}
    train(run, resume=True, **options)
    train(tmp_path / "straight", **options)
    assert hashes(run) == hashes(tmp_path / "straight")
