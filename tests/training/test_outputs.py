"""What a run writes beside its checkpoints: averaged weights and a diffusers pipeline, which are
complete at every moment and belong to the newest checkpoint.
"""

import json
import shutil
from contextlib import suppress

import pytest
import torch

from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.io.files import WriteError, verify_folder
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from diffcore.samplers import AdaptiveRungeKutta
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, sample
from diffcore.training import loop
from diffcore.training.checkpoints import checkpoint
from diffcore.training.checkpoints.writer import CheckpointWriter
from diffcore.training.reports.reporting import Reporter
from tests.helpers.file_faults import fault, full_disk
from tests.helpers.tiny_pipelines import unet
from tests.helpers.training_runs import hashes, make_trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_pipeline_of_a_run_gives_its_samples(trained):
    pipe, denoiser = DiffcorePipeline.from_pretrained(trained / "pipeline"), Run(trained).denoiser()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.process == denoiser.process
    images = pipe(class_labels=[0, 7], seeds=[0, 1], output_type="latent").images
    recipe = {"steps": 25, "guidance": CFG(1.5)}
    inputs = {"seeds": [0, 1], "condition": [0, 7], "batch_size": 2}
    assert torch.equal(
        images, sample(denoiser, DEFAULT_SAMPLER, DEFAULT_GRID, **inputs, **recipe).x
    )
    assert sorted(path.name for path in trained.glob(".pipeline*")) == []


REASONS = {
    "the network is a LabelRecorder, and a pipeline holds ModelMixins": {},
    "is adaptive, and a pipeline needs the levels": {
        "network": lambda: unet(in_channels=1, out_channels=1, num_class_embeds=11),
        "sampler": AdaptiveRungeKutta(),
    },
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_run_that_writes_no_pipeline_prints_the_reason_at_its_end(tmp_path, capsys, reason):
    train(tmp_path / "run", steps=2, save_every=1, **REASONS[reason])
    lines = [line for line in capsys.readouterr().err.splitlines() if "diffcore: no " in line]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not (tmp_path / "run" / "pipeline").exists()


def make_unet_trainer(folder, **options):
    """A trainer of a network of diffusers, of which a run writes a pipeline."""
    return make_trainer(folder, network=small_unet, **options)


def small_unet():
    channels = {"in_channels": 1, "out_channels": 1, "num_class_embeds": 11}
    channels |= {"attention_head_dim": 4}
    return unet(
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **channels,
    )


@pytest.fixture
def run(tmp_path):
    """A finished run of three steps, with a pipeline."""
    make_unet_trainer(tmp_path / "run", steps=3, save_every=2).train()
    return Run(tmp_path / "run")


def resume(run, steps=3, **options):
    make_unet_trainer(run.folder, steps=steps, save_every=2, resume=True, **options).train()


def read_steps(run):
    """The step of the newest checkpoint, and that of the averaged weights, all verified."""
    newest = checkpoint.newest(run.checkpoints, pytest.fail)
    read_weights(run.weights)
    verify_folder(run.pipeline)
    assert (run.pipeline / "model_index.json").is_file()
    return newest.state["step"]


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.slow
def test_a_fault_of_any_file_operation_of_a_save_leaves_every_output_whole(run, killed):
    trainer = make_unet_trainer(run.folder, steps=9, resume=True)
    state = trainer.train()
    reporter, position = Reporter(trainer, state.accelerator), 0
    while True:
        with fault(position, killed) as faults, suppress(WriteError):
            loop.save(state, reporter, CheckpointWriter(state))
        if not faults.happened:
            break
        assert read_steps(run) == 9
        position += 4 - killed  # every third or fourth: a save has about 75
    assert position > 50
    resume(run, steps=9)
    assert list(run.folder.rglob(".*")) == []


DAMAGES = {
    "the averaged weights are those of an earlier checkpoint": lambda run: shutil.copy(
        run.checkpoints / "step-00000002/ema.safetensors", run.weights
    ),
    "the pipeline is missing": lambda run: shutil.rmtree(run.pipeline),
    "a weight of the pipeline has changed": lambda run: flip_byte(
        run.pipeline / "unet/diffusion_pytorch_model.safetensors"
    ),
    "a file of the pipeline is missing": lambda run: (run.pipeline / "model_index.json").unlink(),
    "the process has changed": lambda run: flip_byte(run.process),
    "the averaged weights are missing": lambda run: run.weights.unlink(),
    "the record is missing": lambda run: (run.checkpoints / "outputs.json").unlink(),
}


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_resuming_a_finished_run_writes_what_its_newest_checkpoint_determines(run, damage):
    whole = hashes(run.folder)
    DAMAGES[damage](run)
    assert hashes(run.folder) != whole
    resume(run)
    assert hashes(run.folder) == whole


def test_a_kill_between_the_last_checkpoint_and_its_outputs_is_mended_on_resume(
    run, tmp_path, monkeypatch, capsys
):
    make_unet_trainer(tmp_path / "killed", steps=2, save_every=2).train()
    killed = make_unet_trainer(tmp_path / "killed", steps=3, save_every=2, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("diffcore.training.checkpoints.outputs.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.train()
    capsys.readouterr()
    resume(Run(tmp_path / "killed"))
    assert hashes(tmp_path / "killed") == hashes(run.folder)
    message = "writing the averaged weights and the pipeline of step 3 again"
    assert message in capsys.readouterr().err


def test_other_sampling_settings_on_resume_enter_the_pipeline(run):
    resume(run, guidance=CFG(2.5))
    index = json.loads((run.pipeline / "model_index.json").read_text())
    assert index["guidance"]["init_args"]["scale"] == 2.5


def test_a_pipeline_that_is_a_link_does_not_stop_the_run(run, capsys):
    run.pipeline.rename(run.folder / "elsewhere")
    run.pipeline.symlink_to(run.folder / "elsewhere")
    before = hashes(run.folder / "elsewhere")
    resume(run, steps=4)
    assert "run/pipeline is a link, which is not replaced: remove it" in capsys.readouterr().err
    assert hashes(run.folder / "elsewhere") == before
    assert read_steps(run) == 4
    run.pipeline.unlink()
    resume(run, steps=4)
    assert read_steps(run) == 4
    assert not run.pipeline.is_symlink()


def test_a_disk_that_is_full_for_the_pipeline_leaves_the_older_one_and_the_checkpoint(
    run, tmp_path, capsys, monkeypatch
):
    before = hashes(run.pipeline)
    save_pretrained = DiffcorePipeline.save_pretrained

    def save_on_full_disk(*arguments, **options):
        with full_disk(5000):
            save_pretrained(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DiffcorePipeline, "save_pretrained", save_on_full_disk)
        resume(run, steps=4)
    message = capsys.readouterr().err
    assert "run/pipeline cannot be written (" in message
    assert "an older one of this name is kept whole" in message
    assert "the checkpoint of step 4 is whole" in message
    assert hashes(run.pipeline) == before
    resume(run, steps=4)
    assert hashes(run.pipeline) != before
