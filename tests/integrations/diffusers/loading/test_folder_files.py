"""Files of a pipeline's folder: variants of the weights, single files, refused schedulers."""

from dataclasses import replace

import diffusers
import pytest
import torch

from diffcore.cli.image_model import read_sampling_settings
from diffcore.distillation import PipelineTeacher
from diffcore.integrations.diffusers import from_diffusers
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.io.specs import from_spec
from diffcore.schedules import Grid
from tests.helpers.tiny_pipelines import quiet, unet


@pytest.fixture
def pipe():
    return quiet(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()))


def test_weights_of_a_variant_are_read(tmp_path, pipe):
    pipe.save_pretrained(tmp_path, variant="fp16")
    network = from_diffusers(tmp_path).network
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_of_two_variants_neither_is_read_and_beside_plain_weights_both_are_ignored(tmp_path, pipe):
    pipe.save_pretrained(tmp_path, variant="fp16")
    pipe.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(ValueError, match="weights of the variants ema, fp16, expected one: move"):
        from_diffusers(tmp_path)
    pipe.save_pretrained(tmp_path)
    from_diffusers(tmp_path)


def test_a_single_file_is_refused_with_the_conversion(tmp_path):
    path = tmp_path / "sd.safetensors"
    path.touch()
    for read in (from_diffusers, PipelineIndex, read_sampling_settings):
        with pytest.raises(ValueError, match=r"is a file, .*from_single_file\(.*\)\.save_pre"):
            read(path)


def test_the_folder_of_a_flow_of_few_steps_is_not_sampled_by_another_rule(tmp_path, pipe):
    pipe.scheduler = diffusers.FlowMatchLCMScheduler()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a FlowMatchLCMScheduler, which samples a distilled"):
        read_sampling_settings(tmp_path)


@pytest.mark.parametrize(("scheduler", "sampler"), [("LCM", "Consistency"), ("TCD", "TCD")])
def test_the_folder_of_a_consistency_network_is_sampled_by_its_rule_and_timesteps(
    tmp_path, pipe, scheduler, sampler
):
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")()
    pipe.save_pretrained(tmp_path)
    settings = read_sampling_settings(tmp_path)
    assert settings["sampler"]["class_path"] == sampler
    with pytest.raises(ValueError, match=r"estimates the consistency of its process"):
        PipelineTeacher(str(tmp_path)).check(replace(from_diffusers(pipe).process, classes=0))
    assert from_diffusers(pipe).process.estimate == "consistency"
    assert settings["sample_steps"] == 4
    assert settings["guidance"]["init_args"]["scale"] == 1.0
    grid = from_spec(Grid, settings["grid"])
    process = from_diffusers(tmp_path).process
    assert process.estimate == "consistency"
    pipe.scheduler.set_timesteps(4)
    times = [process.time(knot) for knot in grid.knots(process.schedule, 4)[:-1]]
    assert times == pytest.approx(pipe.scheduler.timesteps.tolist())
