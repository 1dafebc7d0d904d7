"""Flow schedulers of diffusers: σ against the scheduler, λ against the time shift of SD3."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin

from diffcore.schedules import Flow, Shifted, schedule_from_diffusers
from tests.helpers.diffusers_schedulers import CLASSES, config

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' numpy

FLUX = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "max_image_seq_len": 4096,
}
SHIFTS = [1.0, 3.0, 12.0, 0.4]
"""Time shifts; SD3 uses 3."""


def shifted_flow(s: float, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """σ at the time a after the time shift s (2403.03206, eq. 23), and λ for α = 1 - σ."""
    a = np.asarray(a, dtype=np.longdouble)
    sigma = s * a / (1 + (s - 1) * a)
    with np.errstate(divide="ignore"):
        return sigma, (2 * np.log((1 - a) / (s * a))).astype(float)


def check_flow(
    scheduler: ConfigMixin,
    s: float,
    a: Sequence[float],
    sigmas: Sequence[float],
    mu: float | None = None,
) -> None:
    """Assert the σ of a scheduler to 1e-6, and λ of the formula to 1e-9.

    Args:
        scheduler: flow scheduler whose config is read.
        s: expected time shift.
        a: times of the levels that are compared.
        sigmas: σ of the scheduler at these times.
        mu: μ of a dynamic shift.
    """
    schedule = schedule_from_diffusers(config(scheduler), mu)
    sigma, logsnr = shifted_flow(s, a)
    level = schedule.level(torch.tensor(np.array(a, dtype=float)))
    assert schedule.scaling == "flow"
    np.testing.assert_allclose(level.sigma, np.asarray(sigmas, dtype=float), rtol=0, atol=1e-6)
    np.testing.assert_allclose(level.sigma, sigma.astype(float), rtol=1e-14)
    np.testing.assert_allclose(level.logsnr, logsnr, rtol=0, atol=1e-9)


@pytest.mark.parametrize("s", SHIFTS)
@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"],
)
def test_the_table_of_a_flow_scheduler_is_the_shifted_flow_at_its_indices(name, s):
    scheduler = CLASSES[name](shift=s)
    check_flow(scheduler, s, np.arange(1000, 0, -1) / 1000, scheduler.sigmas)


@pytest.mark.parametrize("s", SHIFTS)
@pytest.mark.parametrize(
    "name", ["FlowMapEulerDiscreteScheduler", "MiniMaxH3Scheduler", "PiflowScheduler"]
)
def test_flow_schedulers_without_a_table_sample_at_levels_of_the_shifted_flow(name, s):
    scheduler = CLASSES[name](shift=s)
    scheduler.set_timesteps(9)
    a = {
        "FlowMapEulerDiscreteScheduler": np.linspace(1, 0, 10),
        "MiniMaxH3Scheduler": np.linspace(1, 0, 9),
        "PiflowScheduler": np.append(1 - np.arange(9) / 8.5, 0),
    }[name]
    check_flow(scheduler, s, a[:-1], scheduler.sigmas[:-1])
    assert scheduler.sigmas[-1] == 0 == schedule_from_diffusers(config(scheduler)).level(0.0).sigma


@pytest.mark.parametrize("name", ["HeliosScheduler", "HeliosDMDScheduler"])
def test_helios_is_a_shifted_flow_at_one_resolution_and_is_refused_as_a_pyramid(name):
    scheduler = CLASSES[name](stages=1, stage_range=[0, 1], shift=5.0)
    a = (1 - np.linspace(1, 1 / 1000, 1001))[:0:-1]
    check_flow(scheduler, 5.0, a, scheduler.sigmas)
    with pytest.raises(ValueError, match="stages is 3, expected 1"):
        schedule_from_diffusers(config(CLASSES[name]()))
    s = 2.0 if name == "HeliosDMDScheduler" else math.exp(2.0)
    dynamic = {"_class_name": name, "stages": 1, "use_dynamic_shifting": True}
    assert schedule_from_diffusers(dynamic, mu=2.0) == Shifted(Flow(), -2 * math.log(s))
    assert scheduler.config.time_shift_type == ("linear" if s == 2 else "exponential")


@pytest.mark.parametrize("s", [1.0, 3.0, 5.0])
@pytest.mark.parametrize(
    "name",
    [
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverMultistepInverse",
        "DPMSolverSinglestep",
        "SASolver",
        "UniPCMultistep",
    ],
)
def test_use_flow_sigmas_is_the_shifted_flow_for_any_beta_table(name, s):
    scheduler = CLASSES[f"{name}Scheduler"](
        use_flow_sigmas=True, flow_shift=s, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(8)
    if name == "UniPCMultistep":
        a, offset = np.linspace(1, 1 / 1000, 9)[:-1], np.array([1e-6, *[0] * 7])
    else:  # starts at a = 1 - 1/T, not at pure noise
        a, offset = (1 - np.linspace(1, 1 / 1000, 9))[:0:-1], 0
    check_flow(
        scheduler,
        s,
        a,
        np.asarray(scheduler.sigmas[:8], dtype=float) + offset,
    )


@pytest.mark.parametrize("mu", [0.5, 1.15])
@pytest.mark.parametrize(("shift_type", "s"), [("exponential", math.exp), ("linear", float)])
def test_dynamic_shifting_uses_the_given_mu(shift_type, s, mu):
    scheduler = CLASSES["FlowMatchEulerDiscreteScheduler"](**FLUX, time_shift_type=shift_type)
    scheduler.set_timesteps(28, mu=mu)
    check_flow(scheduler, s(mu), np.linspace(1, 1 / 1000, 28), scheduler.sigmas[:-1], mu)
    with pytest.raises(ValueError, match="use_dynamic_shifting is set: give mu"):
        schedule_from_diffusers(config(scheduler))


@pytest.mark.parametrize(
    "name", ["UniPCMultistep", "DPMSolverMultistep", "DEISMultistep", "DPMSolverSinglestep"]
)
def test_dynamic_shifting_of_the_solvers_is_exponential(name):
    scheduler = CLASSES[f"{name}Scheduler"](use_flow_sigmas=True, use_dynamic_shifting=True)
    scheduler.set_timesteps(8, mu=0.9)
    noisiest = 1 - 1e-6 if name == "UniPCMultistep" else 1 - 1 / 1000
    check_flow(scheduler, math.exp(0.9), [noisiest], scheduler.sigmas[:1], mu=0.9)


def test_ltx_and_proteina_are_flows():
    scheduler = CLASSES["LTXEulerAncestralRFScheduler"]()
    scheduler.set_timesteps(10)
    check_flow(
        scheduler,
        1.0,
        np.linspace(1, 1 / 1000, 10),
        scheduler.sigmas[:-1],
    )
    protein = CLASSES["RFD4ProteinaScheduler"]("log", "tan", 1.0, 1.0)
    ones, zeros = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    sigma = protein.add_noise(zeros, ones, 0.7).mean()  # the 0.7 of RFD4 is a share of data
    check_flow(protein, 1.0, [0.3], [sigma])


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"]
)
def test_the_cleanest_flow_level_is_shifted_once_where_diffusers_shifts_it_twice(name):
    scheduler = CLASSES[f"{name}Scheduler"](shift=3.0)
    sigma = schedule_from_diffusers(config(scheduler)).level(1 / 1000).sigma
    assert sigma == pytest.approx(3 / 1002, rel=1e-12)
    assert scheduler.sigma_min == pytest.approx(sigma, rel=1e-6)
    scheduler.set_timesteps(28)
    assert scheduler.sigmas[-2].item() == pytest.approx(0.00893, abs=1e-5)
