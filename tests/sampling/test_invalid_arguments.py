"""Arguments with which sampling is not defined are rejected before the network is evaluated."""

import math

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import TimeConditioning
from diffcore.guidance import CFG
from diffcore.sampling.generation import sample
from diffcore.schedules import (
    Cosine,
    Discrete,
    Explicit,
    Linspace,
    Trailing,
    UniformLogSNR,
)
from tests.helpers.oracles import (
    ExactNetwork,
    mixture,
    process,
)
from tests.helpers.recording_network import SEEDS, small_denoiser

UNDEFINED_AT_NOISE = [
    ({"prediction": "epsilon"}, "v_prediction"),
    ({"time": TimeConditioning("logsnr", 1.0)}, "clamp"),
    ({"time": TimeConditioning("sigma", 1.0)}, "clamp"),
    ({"schedule": Cosine(scaling="ve")}, "vp or flow"),
]


@pytest.mark.parametrize(("fields", "remedy"), UNDEFINED_AT_NOISE)
def test_a_process_undefined_at_pure_noise_is_rejected_before_any_evaluation(fields, remedy):
    denoiser = small_denoiser(**fields)
    with pytest.raises(ValueError, match=f"pure noise.*{remedy}"):
        sample(denoiser, steps=5, seeds=SEEDS)
    assert denoiser.network.batch_sizes == []


@pytest.mark.parametrize(("fields", "remedy"), UNDEFINED_AT_NOISE)
def test_the_same_process_samples_from_a_finite_level(fields, remedy):
    record = process(**fields)
    denoiser = Denoiser(ExactNetwork(mixture(record), record), record)
    result = sample(
        denoiser,
        grid=UniformLogSNR(-8.0, 8.0),
        steps=5,
        seeds=SEEDS,
        dtype=torch.float64,
        batch_size=7,
    )
    truth = sample(
        mixture(record),
        grid=UniformLogSNR(-8.0, 8.0),
        steps=5,
        seeds=SEEDS,
        dtype=torch.float64,
        batch_size=7,
    )
    torch.testing.assert_close(result.x, truth.x, rtol=1e-9, atol=1e-9)
    assert len(denoiser.network.calls) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": [0, 1, 3]}, r"labels \[3\] are out of range"),
        ({"condition": [0, -1, 1]}, r"labels \[-1\] are out of range"),
        ({"condition": [0, 1]}, "one label for each of 3 seeds"),
        ({"condition": None, "guidance": CFG(2.0)}, "needs a condition"),
        ({"seeds": [], "condition": []}, "seeds is empty"),
        ({"seeds": [1, 2, 2**63]}, r"which is beyond 64 bits: expected integers within"),
        ({"seeds": [1, 2.0, 3]}, r"seeds has 2.0, expected integers within"),
        ({"seeds": torch.tensor([0.5, 1.0, 2.0])}, r"seeds has tensor\(0.5000\), expected int"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"grid": Explicit((-1.0, 0.0)), "steps": 3}, "steps is 3"),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected_before_any_evaluation(changes, message):
    denoiser = small_denoiser()
    arguments = {"steps": 4, "seeds": [1, 2, 3], "condition": [0, 1, 0]} | changes
    with pytest.raises(ValueError, match=message):
        sample(denoiser, **arguments)
    assert denoiser.network.batch_sizes == []


@pytest.mark.parametrize("w", (0.0, 2.0))
def test_guidance_without_condition_dropout_is_rejected(w):
    denoiser = small_denoiser(dropout=0.0)
    with pytest.raises(ValueError, match=r"without condition dropout.*CFG\(1\.0\)"):
        sample(denoiser, steps=4, seeds=[1], condition=[0], guidance=CFG(w))
    assert denoiser.network.batch_sizes == []
    sample(denoiser, steps=4, seeds=[1], condition=[0], guidance=CFG(1.0), batch_size=1)
    assert denoiser.network.batch_sizes == [1] * 4


def test_a_condition_for_a_network_without_classes_is_rejected():
    with pytest.raises(ValueError, match="no classes"):
        sample(small_denoiser(classes=0), steps=2, seeds=[1], condition=[0])


@pytest.mark.parametrize("grid", (Trailing(), Linspace()), ids=str)
def test_more_steps_than_a_table_has_are_rejected(grid):
    denoiser = small_denoiser(schedule=Discrete(steps=100))
    with pytest.raises(ValueError, match="table of 100"):
        sample(denoiser, grid=grid, steps=101, seeds=[1])
    assert denoiser.network.batch_sizes == []


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_prediction_of_x0_cannot_start_at_the_clean_level(prediction):
    rising = Explicit((math.inf, 2.0, -3.0))
    denoiser = mixture(process(prediction=prediction))
    if prediction == "sample":
        with pytest.raises(ValueError, match="clean"):
            sample(denoiser, grid=rising, steps=2, seeds=SEEDS)
    else:
        assert sample(denoiser, grid=rising, steps=2, seeds=SEEDS, batch_size=7).x.isfinite().all()


def test_a_run_to_pure_noise_in_ve_is_rejected():
    with pytest.raises(ValueError, match="last knot is pure noise"):
        sample(
            mixture(process(Cosine(scaling="ve"))),
            grid=Explicit((3.0, 0.0, -math.inf)),
            steps=2,
            seeds=SEEDS,
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_a_dtype_that_holds_no_fractions_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype is {dtype}, expected a floating-point type"):
        sample(small_denoiser(), steps=2, seeds=SEEDS, dtype=dtype)


def test_a_label_with_a_fraction_is_refused_by_sampling():
    with pytest.raises(ValueError, match=r"condition holds torch\.float32, expected integers"):
        sample(small_denoiser(classes=3), steps=2, seeds=[0], condition=[1.5])
