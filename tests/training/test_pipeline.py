"""The diffusers pipeline that a run writes: its averaged network, and why a run may write none."""

import shutil

import pytest
import torch

from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.io.files import write_folder
from diffcore.run import Run
from diffcore.samplers import AdaptiveRungeKutta
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, sample
from tests.helpers.tiny_pipelines import unet
from tests.helpers.training_runs import train

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


def test_a_new_pipeline_replaces_the_old_one_and_interrupted_writes(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "pipeline" / "old").touch()
    (folder / ".pipeline.123").mkdir()
    pipe = DiffcorePipeline.from_pretrained(trained / "pipeline")
    write_folder(folder / "pipeline", pipe.save_pretrained)
    assert not (folder / "pipeline" / "old").exists()
    assert not list(folder.glob(".pipeline*"))
    assert DiffcorePipeline.from_pretrained(folder / "pipeline").process == pipe.process


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
