"""Teachers: frozen, guided, matched to the student's levels and labels, and checked against it."""

import shutil
from dataclasses import replace

import pytest
import torch

from diffcore.core.process import Process
from diffcore.distillation.guided_denoiser import predict_guided
from diffcore.distillation.teacher import (
    OracleTeacher,
    PipelineTeacher,
    RunTeacher,
    check_same_process,
)
from diffcore.guidance import APG, CFG, Interval
from diffcore.guidance.cfg import extrapolate_linearly
from diffcore.integrations.diffusers.loading.network import from_diffusers
from diffcore.integrations.diffusers.loading.prompts import Prompts, wrap_with
from diffcore.io.safetensors import read_weights, write_weights
from diffcore.networks import Perceptron
from diffcore.run import Run, without_locations
from diffcore.schedules import Cosine, Flow, Truncated
from tests.helpers.captioned_images import write_pipeline
from tests.helpers.oracles import mixture, process
from tests.helpers.training_runs import train

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 2])


def levels(schedule, *times):
    """A level of each sample."""
    return schedule.level(torch.tensor(times, dtype=torch.float64).view(-1, 1))


NETWORK = """
network:
  class_path: diffcore.networks.Perceptron
  init_args: {shape: [1, 8, 8], width: 16, layers: 1, classes: 10}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(folder, steps=2, network=lambda: Perceptron([1, 8, 8], 16, 1, 10), config=NETWORK)
    return folder


def test_a_guided_oracle_extrapolates_from_the_unconditional_one_at_a_level_of_each_sample():
    oracle = mixture()
    level = levels(oracle.process.schedule, 0.2, 0.4, 0.6, 0.9)
    guided = OracleTeacher(oracle, CFG(2.5)).denoiser()(X, level, LABELS)
    for row in range(len(X)):
        x, one = X[row : row + 1], oracle.process.schedule.level(float(level.t[row]))
        conditional = oracle(x, one, LABELS[row : row + 1])
        expected = extrapolate_linearly(oracle(x, one), conditional, 2.5)
        torch.testing.assert_close(guided.x0[row : row + 1], expected.x0)
        torch.testing.assert_close(guided.eps[row : row + 1], expected.eps)


def test_scales_of_each_sample_give_the_guided_prediction_of_each():
    oracle = mixture()
    level, scales = levels(oracle.process.schedule, 0.2, 0.4, 0.6, 0.9), (1.0, 0.0, 3.0, 2.0)
    found = predict_guided(oracle, X, level, LABELS, torch.tensor(scales))
    for row, scale in enumerate(scales):
        one = OracleTeacher(oracle, CFG(scale)).denoiser()(X, level, LABELS)
        torch.testing.assert_close(found.x0[row], one.x0[row])


def test_a_teacher_of_another_schedule_is_evaluated_at_the_same_logsnr_and_rescaled():
    student = process(Flow())
    teacher = OracleTeacher(mixture(process(Cosine()))).denoiser("cpu")
    level = levels(student.schedule, 0.1, 0.3, 0.7, 0.99)
    found, expected = (
        teacher(X, level, LABELS),
        mixture(student)(X, level, LABELS),
    )
    torch.testing.assert_close(found.x0, expected.x0)
    torch.testing.assert_close(found.eps, expected.eps)


def test_a_run_is_loaded_once_in_evaluation_mode_and_without_gradients(run):
    first, second = RunTeacher(str(run)).denoiser(), RunTeacher(str(run), guidance=CFG(2.0))
    network = first.network
    assert second.denoiser().network is network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    level, own = Cosine().level(0.5), Run(run).denoiser()
    assert torch.equal(first(x, level, LABELS[:2]).x0, own(x, level, LABELS[:2]).x0)


def test_a_run_whose_weights_changed_is_loaded_again(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    old, path = RunTeacher(str(folder)).denoiser(), Run(folder).weights
    weights = read_weights(path)
    write_weights(path, {name: value + 1 for name, value in weights.items()})
    new = RunTeacher(str(folder)).denoiser()
    for first, second in zip(old.network.parameters(), new.network.parameters(), strict=True):
        torch.testing.assert_close(first + 1, second)


def test_the_hash_of_a_run_is_that_of_its_weights_and_not_of_its_folder(run, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(run)
    teachers = RunTeacher(str(run)), RunTeacher(str(moved)), RunTeacher(str(run), "raw")
    averaged, same, raw = (teacher.content_hash for teacher in teachers)
    assert averaged == same != raw
    spec = {"class_path": "RunTeacher", "init_args": {"folder": "a", "weights": "raw"}}
    objective = {"class_path": "Consistency", "init_args": {"teacher": spec}}
    assert without_locations(objective)["init_args"]["teacher"]["init_args"] == {"weights": "raw"}


def test_the_hash_of_an_oracle_is_that_of_its_numbers():
    first, second, third = mixture(), mixture(), mixture()
    third.means = third.means + 1
    hashes = [OracleTeacher(oracle).content_hash for oracle in (first, second, third)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_pipeline_receives_the_prompts_of_the_student(tmp_path):
    folder = write_pipeline(tmp_path / "pipeline")
    prompts = Prompts({"encoder_hidden_states": torch.randn(3, 5, 8)}, ("a cat", "a dog"))
    fields = PipelineTeacher(str(folder)).process
    student = replace(fields, classes=2, dropout=0.1)
    wrapper = wrap_with(prompts, torch.device("cpu"))
    teacher = PipelineTeacher(str(folder), CFG(3.0)).denoiser("cpu", student, wrapper)
    x, labels = torch.randn(2, *student.shape), torch.tensor([0, 1])
    level = student.schedule.level(0.6)
    expected = from_diffusers(folder, prompts=prompts)
    reference = expected(x, level), expected(x, level, labels)
    guided = extrapolate_linearly(*reference, 3.0)
    torch.testing.assert_close(teacher(x, level, labels).x0, guided.x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": (3,)}, r"process.shape of the student is \(2,\).*\(3,\)"),
        ({"low": -2.0}, "process.low of the student is -1.0.*give the student the teacher's low"),
        ({"classes": 3}, "process.classes of the student is 2"),
        ({"estimate": "consistency"}, "estimates the consistency.*trained by denoising"),
        ({"schedule": Truncated(Cosine(), -5.0, 5.0)}, "cannot be evaluated at the levels"),
    ],
)
def test_unequal_processes_are_refused_with_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        check_same_process(process(), replace(process(), **fields))


def test_another_prediction_type_and_another_scaling_are_accepted():
    check_same_process(process(Flow()), replace(process(), prediction="epsilon"))


@pytest.mark.parametrize("rule", [APG(2.0, momentum=-0.5), Interval(CFG(2.0), 0.2, 2.0)])
def test_rules_with_a_state_or_switches_are_refused(rule):
    with pytest.raises(ValueError, match=r"teacher.guidance is .*: use CFG with a number"):
        OracleTeacher(mixture(), rule).check(process())


def test_guidance_of_a_teacher_without_condition_dropout_is_refused():
    record = replace(process(), dropout=0.0)
    with pytest.raises(ValueError, match=r"trained without condition dropout: use CFG\(1.0\)"):
        OracleTeacher(mixture(record), CFG(2.0)).check(record)


def test_missing_folders_are_refused(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match="does not exist: name the folder of a run"):
        RunTeacher(missing)
    with pytest.raises(ValueError, match="does not exist: name the folder of a diffusers pipeline"):
        PipelineTeacher(missing)
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "config.yaml").write_text("network: torch.nn.Identity\n")
    Process().save(empty / "process.json")
    with pytest.raises(ValueError, match="a run without weights: train it first"):
        RunTeacher(str(empty))
