"""A run's folder gives back the trained network; errors name the file that is at fault."""

import json
import re
import shutil

import pytest
import torch

from diffcore.cli.main import main
from diffcore.core.process import Process
from diffcore.io.safetensors import read_weights, write_weights
from diffcore.run import Run, without_locations
from tests.conftest import forget_accelerate


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return Run(tmp_path / "run")


def test_the_denoiser_has_the_averaged_weights_and_the_saved_process(run):
    denoiser = run.denoiser()
    assert denoiser.process == Process.load(run.process)
    assert not denoiser.training
    own = denoiser.network.state_dict()
    for name, value in read_weights(run.weights).items():
        assert torch.equal(own[name], value), name


def test_a_new_network_has_the_runs_architecture_and_new_weights(run):
    new, old = run.network().state_dict(), read_weights(run.weights)
    assert {name: value.shape for name, value in new.items()} == {
        name: value.shape for name, value in old.items()
    }
    assert not torch.equal(new["conv_in.weight"], old["conv_in.weight"])


@pytest.mark.parametrize("name", ["process.json", "config.yaml", "ema.safetensors"])
@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", "null"])
def test_the_error_names_a_file_that_is_missing_or_corrupt(run, name, content):
    if content is None:
        (run.folder / name).unlink()
        shutil.rmtree(run.checkpoints)  # whose averaged weights would do
    else:
        (run.folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        run.denoiser()


def test_a_run_with_an_empty_config_names_the_argument_by_which_it_is_sampled(run):
    network = run.network()
    run.config.write_text("")
    with pytest.raises(ValueError, match=r"config.yaml is empty.*denoiser\(network=\.\.\.\)"):
        run.denoiser()
    assert not run.denoiser(network=network).training


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a run's folder: it does not exist"):
        Run(tmp_path / "nowhere").denoiser()


def test_weights_of_another_network_are_refused(run):
    write_weights(
        run.weights, {name: value[:1] for name, value in read_weights(run.weights).items()}
    )
    with pytest.raises(
        ValueError, match=r"ema\.safetensors does not fit the network of .*config\.yaml"
    ):
        run.denoiser()


def test_the_error_of_a_misspelt_field_names_it_and_the_nearest_field(run):
    record = json.loads(run.process.read_text())
    record["predicton"] = record.pop("prediction")
    run.process.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"process\.json .*'predicton'.*did you mean 'prediction'"):
        run.denoiser()


def test_a_config_with_other_options_of_the_network_is_refused(run, capsys):
    """They change no shape of the weights, and the samples."""
    text = run.config.read_text()
    run.config.write_text(text.replace("norm_num_groups: 4", "norm_num_groups: 2"))
    assert run.config.read_text() != text
    message = r"was trained with other options of the network than .*config.yaml has: restore them"
    with pytest.raises(ValueError, match=message) as error:
        run.denoiser()
    remedy = re.search(r"diffcore (.*) names them", str(error.value))[1]
    forget_accelerate()
    assert main(remedy.split()) == 1
    assert "another network.init_args.norm_num_groups (4, now 2)" in capsys.readouterr().err
    run.denoiser(network=run.network())
    run.config.write_text(text)
    run.denoiser()


def test_folders_whose_content_is_hashed_do_not_identify_a_component():
    images = {"class_path": "ImageFolder", "init_args": {"folder": "a", "size": 8}}
    subset = {"class_path": "mine.Subset", "init_args": {"data": images, "folder": "b"}}
    expected = {"data": images | {"init_args": {"size": 8}}, "folder": "b"}
    assert without_locations(subset) == subset | {"init_args": expected}
    assert without_locations("Digits") == "Digits"
    files = {"path": "a", "labels": "b", "conditions": {"depth": "c"}}
    arrays = {"class_path": "Arrays", "init_args": {**files, "channels": "last"}}
    assert without_locations(arrays)["init_args"] == {"channels": "last"}


def test_a_configuration_cannot_call_functions_outside_diffcore(run):
    run.config.write_text("network: os.getcwd\n")
    with pytest.raises(ValueError, match=r"os\.getcwd"):
        run.denoiser()


def test_the_folder_of_a_run_may_be_a_string(trained):
    assert Run(str(trained)) == Run(trained)
    assert Run(str(trained)).denoiser().process == Run(trained).denoiser().process
