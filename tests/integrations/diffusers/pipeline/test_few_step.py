"""Pipelines of few-step networks: they keep what the pair of the network is."""

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.integrations.diffusers.pipeline.export import export_pipeline
from diffcore.samplers import DDIM, Consistency
from diffcore.sampling.generation import sample
from diffcore.schedules import Trailing
from tests.helpers.oracles import unet


def test_a_saved_pipeline_of_a_consistency_network_is_sampled_as_one(tmp_path):
    process = Process(shape=(1, 8, 8), classes=2, dropout=0.1, estimate="consistency")
    pipe = DiffcorePipeline.of(Denoiser(unet(), process), Consistency(), Trailing(), 2)
    pipe.save_pretrained(tmp_path)
    loaded = DiffcorePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.process.estimate == "consistency"
    latents = loaded(class_labels=[0, 1], seeds=[0, 1], output_type="latent").images
    own = sample(loaded.denoiser, None, Trailing(), 2, seeds=[0, 1], condition=[0, 1], batch_size=2)
    assert torch.equal(latents, own.x)
    with pytest.raises(ValueError, match=r"use Consistency\(\)"):
        loaded(class_labels=[0], seeds=[0], sampler=DDIM())
    with pytest.raises(ValueError, match=r"scheduler of diffusers .* needs E\[x_0 \| x\]"):
        export_pipeline(loaded)
