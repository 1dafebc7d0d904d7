"""Settings, data and networks that cannot be trained are refused before anything is written."""

import math
import re
from functools import partial

import pytest
import torch

from diffcore.core.process import Process
from diffcore.guidance import CFG
from tests.helpers.training_runs import GREY, LabelRecorder, ListDataset, make_trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"accumulation": 0}, "accumulation is 0, expected at least 1"),
        ({"patience": 0}, "patience is 0, expected at least 1"),
        ({"log_every": 0}, "log_every is 0, expected at least 1"),
        ({"save_every": 0}, "save_every is 0, expected at least 1"),
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"sample_steps": 0}, "sample_steps is 0, expected at least 1"),
        ({"prefetch": 0}, "prefetch is 0, expected at least 1"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"sample_every": -1}, "sample_every is -1, expected at least 0"),
        ({"clip": 0.0}, "clip is 0.0, expected a positive norm"),
        ({"clip": math.nan}, "clip is nan, expected a positive norm"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "ListDataset is empty"),
        (
            ((torch.zeros(1, 8, 9), 0),),
            r"\(1, 8, 9\), expected a float tensor .* \(1, 8, 8\)",
        ),
        (((GREY.byte(), 0),), "torch.uint8 .*, expected a float tensor"),
        ((("an image", 0),), "is str, expected a float tensor"),
        (
            ((GREY + 1.01, 0),),
            r"lies in \[1.01, 1.01\], expected within the process's range \[-1, 1\]",
        ),
        (((GREY - 1.01, 0),), r"lies in \[-1.01, -1.01\], expected within"),
        (((GREY, 10),), r"label 10, expected 0 .. 9"),
        (((GREY, -2),), r"label -2, expected 0 .. 9"),
        ((GREY,), r"label -1, expected 0 .. 9"),
    ],
)
def test_data_that_does_not_fit_the_process_is_refused(tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", data=ListDataset(*items))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [10, 11, -1])
def test_a_label_out_of_range_is_refused_in_every_item(tmp_path, label):
    """The trainer checks the first item when it is built, and the others when they are read."""
    with pytest.raises(ValueError, match=rf"label {label}, expected 0 \.\. 9"):
        train(tmp_path, data=ListDataset((GREY, 0), (GREY, label)))


def test_a_dropout_without_classes_is_refused(tmp_path):
    process = Process(shape=(1, 8, 8), dropout=0.1)
    message = "dropout is 0.1, .* there is no condition to drop"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, process=process)


@pytest.mark.parametrize(
    ("process", "guidance", "remedy"),
    [
        (Process(shape=(1, 8, 8), prediction="epsilon"), CFG(1.0), "predicts epsilon"),
        (Process(shape=(1, 8, 8), classes=10), CFG(2.0), "without condition dropout"),
    ],
    ids=["epsilon from pure noise", "guidance without dropout"],
)
def test_previews_that_cannot_be_sampled_are_refused(tmp_path, process, guidance, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_trainer(tmp_path, process=process, guidance=guidance, sample_every=2)
    make_trainer(tmp_path, process=process, guidance=guidance, sample_every=0)


def test_previews_that_cannot_be_drawn_are_refused(tmp_path):
    shape = (1, 2, 2, 2, 2)
    data, process = ListDataset(torch.zeros(shape)), Process(shape=shape)
    options = {"data": data, "process": process, "guidance": CFG(1.0)}
    message = r"sample_every is 2, but samples of shape \(1, 2, 2, 2, 2\) have no picture.*; or set"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options, sample_every=2)
    make_trainer(tmp_path, **options, sample_every=0)
    with pytest.raises(ValueError, match=r"picture is 'points', but .* expected images or frames"):
        make_trainer(tmp_path, guidance=CFG(1.0), picture="points", sample_every=2)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator supports fp16")
def test_fp16_on_a_cpu_is_refused(tmp_path):
    message = "precision is fp16, which a CPU does not support: use bf16 or no"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_split_is_refused(tmp_path):
    message = "batch_size is 16, expected a multiple of 1 ranks x 3 micro-batches"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", batch_size=16, accumulation=3)
    assert not (tmp_path / "run").exists()


def test_an_accumulation_in_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ACCELERATE_MIXED_PRECISION",
            "bf16",
            "the launcher sets mixed precision bf16, but precision is no: train with --precision "
            "bf16, or launch without --mixed_precision",
        ),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "inductor",
            "the launcher sets the compiler inductor, which training does not use: launch without "
            "--dynamo_backend, or unset ACCELERATE_DYNAMO_BACKEND",
        ),
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            "the launcher selects DeepSpeed, which training does not use: launch without "
            "--use_deepspeed, or unset ACCELERATE_USE_DEEPSPEED; --sharding.strategy full",
        ),
    ],
)
def test_an_option_of_the_launcher_that_contradicts_the_settings_is_refused(
    tmp_path, monkeypatch, variable, value, message
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_option_of_the_launcher_that_agrees_with_the_settings_is_accepted(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tmp_path, precision="bf16", steps=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"training on 1 rank, device {device}, precision bf16" in capsys.readouterr().err


def test_two_runs_in_a_process_may_differ_in_precision(tmp_path):
    for precision in ("no", "bf16", "no"):
        state = train(tmp_path / str(len(list(tmp_path.iterdir()))), precision=precision, steps=1)
        assert state.accelerator.mixed_precision == precision


def test_a_tracker_that_is_not_installed_is_refused_beside_another(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "diffcore.training.ranks.accelerator.get_available_trackers", lambda: ["tensorboard"]
    )
    with pytest.raises(ValueError, match="trackers names wandb, which is unknown or not installed"):
        train(tmp_path / "run", trackers=["tensorboard", "wandb"])
    assert not (tmp_path / "run").exists()


def test_trained_weights_in_half_precision_are_refused(tmp_path):
    message = r"weights .* are torch.bfloat16, .*: train float32 weights .*precision: bf16"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", network=lambda: LabelRecorder().bfloat16())
    assert not (tmp_path / "run").exists()
    network = lambda: LabelRecorder().bfloat16().float()  # noqa: E731
    train(tmp_path / "run", network=network, precision="bf16", steps=1)


def test_an_optimizer_that_needs_a_closure_is_refused(tmp_path):
    message = r"optimizer is LBFGS, whose step evaluates the loss several times \(a closure\)"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", optimizer=partial(torch.optim.LBFGS))
    assert not (tmp_path / "run").exists()


class WideNetwork(LabelRecorder):
    """Its output has twice as many channels as x."""

    def forward(self, x, time, class_labels=None):
        return super().forward(x, time, class_labels).repeat(1, 2, 1, 1)


def test_a_network_whose_output_has_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8\).*process's shape"):
        train(tmp_path / "run", network=WideNetwork)
    assert not (tmp_path / "run" / "config.yaml").exists()
