"""A pipeline with LCMScheduler is a consistency network: trained as one, never as a denoiser."""

import json
from dataclasses import replace

import diffusers
import pytest
import yaml

from diffcore.cli.commands.info import describe_pipeline
from diffcore.cli.training.finetuning import complete_settings
from diffcore.cli.training.recipes import find_settings, read_settings
from diffcore.core.process import Process
from diffcore.integrations.diffusers import from_diffusers
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.objectives.objective import Objective
from diffcore.training.checkpoints.initial_weights import check_estimate
from tests.helpers import text_networks
from tests.helpers.captioned_images import OLD, write_images
from tests.helpers.finetune_runs import run_command
from tests.helpers.training_runs import PROCESS, train

RECIPE = "finetune-sd"
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("consistency")
    scheduler = diffusers.LCMScheduler(**OLD)
    text_networks.sd(scheduler).save_pretrained(place / "pipeline")
    write_images(place / "images")
    return place


@pytest.fixture(scope="module")
def settings():
    return read_settings(find_settings(RECIPE))


def test_the_index_and_the_parts_name_a_consistency_network(folder):
    index = PipelineIndex(folder / "pipeline")
    assert index.process_fields["estimate"] == "consistency"
    network = diffusers.UNet2DModel(**SMALL)
    schedulers = diffusers.LCMScheduler(**OLD), diffusers.TCDScheduler(**OLD)
    for scheduler in schedulers:
        assert from_diffusers(network, scheduler).process.estimate == "consistency"
    assert from_diffusers(network, diffusers.DDIMScheduler(**OLD)).process.estimate == (
        "posterior_mean"
    )
    facts = describe_pipeline(folder / "pipeline")
    assert "consistency" in str(facts["prediction"])
    assert "Consistency()" in str(facts["sampling"])


def test_a_recipe_receives_the_estimate_and_the_sampling_of_the_pipeline(folder, settings):
    completed = complete_settings(settings, str(folder / "pipeline"), recipe=RECIPE)
    assert completed["process"]["estimate"] == "consistency"
    assert completed["sampler"]["class_path"].endswith("Consistency")
    assert completed["sample_steps"] == 4
    assert completed["guidance"]["init_args"]["scale"] == 1.0
    own = settings | {"sample_steps": 2}  # of a file, which takes precedence
    assert complete_settings(own, str(folder / "pipeline"))["sample_steps"] == 2


def test_an_estimate_of_denoisers_is_refused_for_it(folder, settings):
    given = {"process.estimate": "posterior_mean"}
    with pytest.raises(ValueError, match=r"LCMScheduler in .* samples a consistency network"):
        complete_settings(settings, str(folder / "pipeline"), given)


@pytest.mark.parametrize("estimate", ("consistency", "mean_velocity"))
def test_denoising_is_no_objective_of_a_network_of_few_steps(estimate):
    process = replace(PROCESS, prediction="v_prediction", estimate=estimate)
    with pytest.raises(ValueError, match=r"Objective trains E\[x_0 \| x\].*RewardTuning"):
        Objective().check(process)
    Objective().check(PROCESS)


def test_weights_of_few_steps_start_no_denoiser(folder, tmp_path):
    consistency = Process(estimate="consistency", prediction="v_prediction")
    check_estimate(folder / "pipeline", consistency)
    with pytest.raises(ValueError, match=r"pipeline, a consistency network, and process.estimate"):
        check_estimate(folder / "pipeline", PROCESS)
    run = tmp_path / "run"
    train(run, steps=1)
    check_estimate(run, consistency)  # a student starts from a denoiser
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    check_estimate(checkpoint, consistency)
    replace(Process.load(run / "process.json"), estimate="consistency").save(run / "process.json")
    with pytest.raises(ValueError, match=r"run, a consistency network"):
        check_estimate(run, PROCESS)
    check_estimate(run / "ema.safetensors", PROCESS)  # which has no process


def test_fine_tuning_by_denoising_is_refused_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ("train", RECIPE, "--pipeline=pipeline", "--data=images", "--trackers=[]")
    assert run_command(*words) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("diffcore train: error: process.estimate is consistency, and Objective")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_consistency_training_of_the_pipeline_writes_one_that_lcm_scheduler_samples(
    folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    intervals = {"grid": "Trailing", "first": 40, "last": 40, "weighting": "MSE"}
    spec = {"class_path": "Consistency", "init_args": {"target": "average"}}
    spec["init_args"]["intervals"] = {"class_path": "KnotIntervals", "init_args": intervals}
    words = ("train", RECIPE, "--pipeline=pipeline", "--data=images", "--trackers=[]")
    short = ("--steps=2", "--batch-size=4", "--save-every=2", "--folder=run")
    assert run_command(*words, *short, f"--objective={json.dumps(spec)}") == 0
    scheduler = json.loads((folder / "run/pipeline/scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    assert Process.load(folder / "run/process.json").estimate == "consistency"
    assert yaml.safe_load((folder / "run/config.yaml").read_text())["sample_steps"] == 4
