"""The pipeline/ that a run leaves: its averaged network, as diffusers loads it."""

import shutil

import pytest
import torch

from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.io.files import write_folder
from diffcore.run import Run
from diffcore.samplers import AdaptiveRungeKutta
from diffcore.sampling.generation import GRID, SAMPLER, sample
from tests.helpers.tiny_pipelines import unet
from tests.training.test_trainer import trained as train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_a_pipeline_that_gives_its_samples(trained):
    pipe, denoiser = DiffcorePipeline.from_pretrained(trained / "pipeline"), Run(trained).denoiser()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.process == denoiser.process
    made = pipe(class_labels=[0, 7], seeds=[0, 1], output_type="latent").images
    ways = {"steps": 25, "guidance": CFG(1.5)}  # the recipe's
    assert torch.equal(
        made,
        sample(denoiser, SAMPLER, GRID, seeds=[0, 1], condition=[0, 7], batch_size=2, **ways).x,
    )
    assert sorted(path.name for path in trained.glob(".pipeline*")) == []


def test_a_pipeline_is_replaced_whole_with_what_an_interrupted_write_left(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "pipeline" / "old").touch()
    (folder / ".pipeline.123").mkdir()
    pipe = DiffcorePipeline.from_pretrained(trained / "pipeline")
    write_folder(folder / "pipeline", pipe.save_pretrained)
    assert not (folder / "pipeline" / "old").exists()
    assert not list(folder.glob(".pipeline*"))
    assert DiffcorePipeline.from_pretrained(folder / "pipeline").process == pipe.process


REASONS = [
    ({}, "the network is a Network, and a pipeline holds ModelMixins"),
    ({"network": lambda: unet(in_channels=1, out_channels=1, num_class_embeds=11), "sampler": AdaptiveRungeKutta()},
     "decides as it goes where to ask"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_a_run_without_a_pipeline_says_why_at_its_end(tmp_path, capsys, options, reason):
    train(tmp_path / "run", steps=2, save_every=1, **options)
    said = [line for line in capsys.readouterr().err.splitlines() if "diffcore: no " in line]
    assert len(said) == 1
    assert reason in said[0]
    assert not (tmp_path / "run" / "pipeline").exists()
