"""Schedules from the configs of diffusers: which classes are read, their defaults, and refusals."""

import math

import pytest
import torch
from diffusers import ConfigMixin

from diffcore.schedules import (
    Cosine,
    Flow,
    LogLinear,
    Rho,
    Shifted,
    ZeroTerminalSNR,
    schedule_from_diffusers,
)
from diffcore.schedules.diffusers_config import ANGLES, FLOWS, REFUSED, SIGMAS, TABLES
from tests.helpers.diffusers_schedulers import CLASSES, config
from tests.helpers.schedules import STABLE_DIFFUSION

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' numpy

WITHOUT_DEFAULTS = {
    "ConsistencyDecoderScheduler",  # its config has no betas
    "HeliosDMDScheduler",  # three resolutions
    "HeliosScheduler",
    "RFD4ProteinaScheduler",  # has required arguments
}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def test_each_class_of_diffusers_is_read_or_refused_and_no_other():
    assert sorted(CLASSES) == sorted([*TABLES, *FLOWS, *ANGLES, *SIGMAS, *REFUSED])


@pytest.mark.parametrize("name", sorted({*TABLES, *FLOWS} - WITHOUT_DEFAULTS))
def test_a_missing_key_has_the_default_of_its_class(name):
    complete = schedule_from_diffusers(config(CLASSES[name]()))
    assert schedule_from_diffusers({"_class_name": name}) == complete


@pytest.mark.parametrize(
    ("content", "schedule"),
    [
        (
            {
                "_class_name": "PNDMScheduler",
                "clip_sample": False,
                "skip_prk_steps": True,
                "set_alpha_to_one": False,
            }
            | SD,
            STABLE_DIFFUSION,
        ),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "leading",
                "use_karras_sigmas": False,
                "interpolation_type": "linear",
            }
            | SD,
            STABLE_DIFFUSION,
        ),
        (
            {
                "_class_name": "DDIMScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            }
            | SD,
            ZeroTerminalSNR(STABLE_DIFFUSION),
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            Shifted(Flow(), -2 * math.log(3)),
        ),
        (
            {"_class_name": "CogVideoXDPMScheduler", "rescale_betas_zero_snr": True},
            ZeroTerminalSNR(Shifted(STABLE_DIFFUSION, -math.log(3))),
        ),
    ],
    ids=["SD 1.5", "SDXL", "SD 2.1 at zero terminal SNR", "SD3", "CogVideoX"],
)
def test_published_configs_are_read_as_the_schedules_of_their_papers(content, schedule):
    assert schedule_from_diffusers(content) == schedule


def test_ipndm_is_cosine_at_the_time_input_of_the_network():
    scheduler = CLASSES["IPNDMScheduler"]()
    scheduler.set_timesteps(50)
    level = schedule_from_diffusers(config(scheduler)).level(scheduler.timesteps)
    torch.testing.assert_close(level.sigma.float(), scheduler.betas[:-1], rtol=0, atol=1e-6)


def test_the_scheduler_of_stable_audio_is_cosine_in_the_ve_scaling():
    scheduler = CLASSES["CosineDPMSolverMultistepScheduler"]()
    level = schedule_from_diffusers(config(scheduler)).level(scheduler.timesteps)
    # float32 of diffusers near t = 1
    torch.testing.assert_close(level.ratio.float(), scheduler.sigmas[:-1], rtol=3e-4, atol=0)
    assert level.schedule == Cosine(scaling="ve")


def test_scm_is_cosine_with_the_angle_as_time():
    scheduler = CLASSES["SCMScheduler"]()
    scheduler.set_timesteps(3, intermediate_timesteps=None, max_timesteps=1.5)
    t = scheduler.timesteps[0].item() * 2 / math.pi
    level = schedule_from_diffusers(config(scheduler)).level(t)
    assert (level.alpha, level.sigma) == pytest.approx((math.cos(1.5), math.sin(1.5)), abs=1e-6)


def check_ratios(scheduler: ConfigMixin, ratios: torch.Tensor) -> None:
    """Assert that uniform times from 1 to 0 have the given σ/α, to 1e-5."""
    t = torch.linspace(1, 0, len(ratios), dtype=torch.float64)
    level = schedule_from_diffusers(config(scheduler)).level(t)
    torch.testing.assert_close(level.ratio, ratios.double(), rtol=1e-5, atol=1e-6)
    assert level.schedule.scaling == "ve"


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_edm_is_its_range_of_sigma_in_the_spacing_of_its_grid(name, spacing):
    scheduler = CLASSES[name](sigma_schedule=spacing, sigma_max=120.0)
    check_ratios(scheduler, scheduler.sigmas[:-1])


def test_the_scheduler_of_consistency_models_is_the_karras_range_of_sigma():
    scheduler = CLASSES["CMStochasticIterativeScheduler"]()
    check_ratios(scheduler, scheduler.sigmas)


def test_continuous_euler_is_its_range_of_sigma():
    video = {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    }
    scheduler = CLASSES["EulerDiscreteScheduler"](**video, use_karras_sigmas=True)
    scheduler.set_timesteps(25)
    check_ratios(scheduler, scheduler.sigmas[:-1])
    exponential = CLASSES["EulerDiscreteScheduler"](**video, use_exponential_sigmas=True)
    assert schedule_from_diffusers(config(exponential)) == LogLinear.ve(0.002, 700.0)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("EDMEulerScheduler", Rho()),
        ("KarrasVeScheduler", LogLinear.ve(0.02, 100.0)),
        ("ScoreSdeVeScheduler", LogLinear.ve(0.01, 1348.0)),
    ],
)
def test_schedulers_of_bounded_sigma_have_the_bounds_of_their_class(name, schedule):
    assert schedule_from_diffusers({"_class_name": name}) == schedule


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_classes_without_a_schedule_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=name) as error:
        schedule_from_diffusers({"_class_name": name})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "mu", "message"),
    [
        ({}, None, "_class_name is None: expected a scheduler of diffusers"),
        (
            {"_class_name": "KarrasScheduler"},
            None,
            "_class_name is 'KarrasScheduler': expected a scheduler",
        ),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "sqrt"},
            None,
            "beta_schedule is 'sqrt', expected linear",
        ),
        (
            {"_class_name": "DDPMScheduler"},
            1.0,
            "mu is 1.0, but the config of DDPMScheduler does not set use_dynamic_shifting",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            0.5,
            "mu is 0.5, but the config of FlowMatch",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0},
            None,
            "the time shift is 0.0, expected",
        ),
        (
            {
                "_class_name": "DDPMScheduler",
                "trained_betas": [0.1, 0.2],
                "num_train_timesteps": 1000,
            },
            None,
            "steps is",
        ),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, 1.2]}, None, r"betas\[1\] is 1.2"),
        (
            {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "use_dynamic_shifting": True,
                "time_shift_type": "cubic",
            },
            1.0,
            "time_shift_type is 'cubic', expected exponential or linear",
        ),
    ],
    ids=str,
)
def test_configs_without_a_schedule_are_refused(content, mu, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_diffusers(content, mu)
