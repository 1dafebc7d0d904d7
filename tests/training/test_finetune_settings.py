"""Settings of a fine-tuning run: what the pipeline completes, and which settings are refused."""

import shutil

import diffusers
import pytest

from diffcore.cli.training.family_recipe import expand_options
from diffcore.cli.training.finetuning import complete_settings
from diffcore.core.process import Process
from diffcore.io.specs import from_spec
from diffcore.schedules import Cosine, Discrete, Shifted, ZeroTerminalSNR
from tests.helpers import text_networks
from tests.helpers.damaged_folders import edit_json
from tests.helpers.finetune_runs import OPTIONS, finetune_command, run_command

PIPELINE_SCHEDULE = Discrete("scaled_linear", 1000, 0.00085, 0.012)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("Cosine", Cosine()),
        (
            {"class_path": "Shifted", "init_args": {"shift": -1.0}},
            Shifted(PIPELINE_SCHEDULE, -1.0),
        ),
        ("ZeroTerminalSNR", ZeroTerminalSNR(PIPELINE_SCHEDULE)),
        (
            {"class_path": "ZeroTerminalSNR", "init_args": {"inner": "Cosine"}},
            ZeroTerminalSNR(Cosine()),
        ),
    ],
    ids=repr,
)
def test_a_schedule_that_wraps_none_of_its_own_wraps_the_pipelines(workspace, setting, expected):
    process = {"schedule": setting, "prediction": "v_prediction"}
    completed = complete_settings({"process": process}, "pipeline")["process"]
    assert from_spec(Process, completed | {"dropout": 0.0}).schedule == expected


def test_zero_terminal_snr_is_not_applied_twice(workspace):
    shutil.copytree("pipeline", "zero")
    edit_json(workspace / "zero/scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    completed = complete_settings({"process": {"schedule": "ZeroTerminalSNR"}}, "zero")["process"]
    assert completed["schedule"]["init_args"]["inner"]["class_path"] == "Discrete"


def test_the_settings_of_a_file_take_precedence_over_the_pipeline(workspace):
    data = {"class_path": "LatentDataset", "init_args": {"pipeline": "other"}}
    completed = complete_settings({"data": data, "network": "mine.Net"}, "pipeline")
    assert completed["data"]["init_args"] == {"pipeline": "other"}
    assert completed["network"] == "mine.Net"


@pytest.mark.parametrize(
    ("words", "peak"),
    [
        (["--lora=4"], "0.0001"),
        (["--text_lora=4"], "0.0001"),
        (["--token=<cat>=cat"], "0.0005"),
        (["--token=<cat>=cat", "--lora=4"], "0.0001"),
        (["--token=<cat>=cat", "--lora=0"], "0.0005"),
        (["--lora=0"], None),
    ],
)
def test_the_learning_rate_of_an_adapter_or_a_new_word_is_its_own(words, peak):
    found = [word for word in expand_options(words) if word.startswith("--lr.peak")]
    assert found == ([] if peak is None else [f"--lr.peak={peak}"])


@pytest.mark.parametrize("given", [{}, {"process.variance": "learned"}])
def test_a_learned_variance_is_an_output_of_the_pipelines_network(workspace, given):
    settings = {"network": {"class_path": "diffcore.integrations.diffusers.PretrainedNetwork"}}
    in_file = {} if given else {"process": {"variance": "learned"}}
    completed = complete_settings(settings | in_file, "pipeline", given)
    expected = {"pipeline": "pipeline", "variance": "learned"}
    assert completed["network"]["init_args"] == expected
    assert "variance" not in complete_settings(settings, "pipeline")["network"]["init_args"]


def test_settings_that_change_the_prediction_type_of_a_flow_are_refused(workspace):
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    text_networks.sd3(flow).save_pretrained("kept-flow")
    with pytest.raises(ValueError, match="use the recipe finetune-flow"):
        complete_settings({"process": {"prediction": "v_prediction"}}, "kept-flow")


@pytest.mark.parametrize(
    "settings",
    [{"process": "VP"}, {"network": {"class_path": "PretrainedNetwork", "init_args": 3}}],
    ids=repr,
)
def test_settings_that_are_no_table_are_refused(workspace, settings):
    with pytest.raises(ValueError, match=r"is .*, expected a table of settings"):
        complete_settings(settings, "pipeline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "finetune-text-to-image"],
            "starts from a pipeline: name the folder of one of diffusers, --pipeline FOLDER",
        ),
        (
            ["train", "finetune-text-to-image", "--pipeline=nowhere"],
            "nowhere/model_index.json is missing",
        ),
        (finetune_command("runs/no", "--data.folder=nowhere"), "nowhere is not a folder"),
        (
            finetune_command("runs/no", "--data.captions=false"),
            "the data has no captions and classes is 0",
        ),
        (
            finetune_command("runs/no", "--data.size=8", "--process.shape=[4,8,8]"),
            "expected a float tensor of the process's shape (4, 8, 8)",
        ),
        (
            ["train", "runs/full/config.yaml", "--pipeline=other", "--folder=runs/no"],
            "pipeline is other, but runs/full/config.yaml reads /",
        ),
        (["export", "runs/lora", "--out=no"], "pipe.load_lora_weights('runs/lora')"),
        (
            finetune_command("runs/no", "--process.classes=7"),
            "classes is 7, but the data has 4 captions",
        ),
        (
            finetune_command("runs/no", "--network.lora.rank=2", "--network.lora.targets=[to_w]"),
            "ends in to_w",
        ),
        (
            ["sample", "runs/full", "--labels=1", "--out=x.safetensors"],
            "is conditioned on text, not on labels",
        ),
    ],
)
def test_invalid_settings_are_refused_in_one_line_before_anything_is_written(
    workspace, capsys, arguments, message
):
    assert run_command(*arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert line.startswith(f"diffcore {arguments[0]}: error: ")
    assert not (workspace / "runs/no").exists()


def test_a_pipeline_with_a_missing_part_trains_an_adapter_but_not_all_weights(workspace, capsys):
    shutil.copytree("pipeline", "partial")
    edit_json(
        workspace / "partial/model_index.json",
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    command = finetune_command("runs/partial", "--pipeline=partial")
    assert run_command(*command) == 1
    assert "partial names feature_extractor in model_index.json" in capsys.readouterr().err
    assert not (workspace / "runs/partial").exists()
    command = finetune_command("runs/partial-lora", "--pipeline=partial", *OPTIONS["lora"])
    assert run_command(*command) == 0
