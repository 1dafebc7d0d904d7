"""Beta tables of diffusers against their schedulers (ᾱ) and extended precision (λ)."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from diffcore.schedules import Discrete, Laplace, schedule_from_diffusers
from diffcore.schedules.diffusers_config import TABLES
from tests.helpers.diffusers_schedulers import CLASSES, config
from tests.helpers.schedules import index_times

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' numpy

FORMS = ("linear", "scaled_linear", "squaredcos_cap_v2")
FURTHER_FORMS = {
    "DDPMScheduler": ("sigmoid",),
    "DDPMParallelScheduler": ("sigmoid",),
    "RePaintScheduler": ("sigmoid",),
    "HeunDiscreteScheduler": ("exp",),
}
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
CONFIGS = {
    "defaults": {},
    "steps": {"num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.4},
    "zero terminal SNR": {"rescale_betas_zero_snr": True},
    "trained betas": {
        "trained_betas": np.linspace(0.01, 0.3, 20) ** 1.5,
        "num_train_timesteps": 20,
    },
}
"""Arguments for each class that has all of them."""
PARTIAL_CONFIGS = {
    "sd15": {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False},
    "sdxl": {
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
        "interpolation_type": "linear",
    },
    "sd21 at zero terminal SNR": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}
"""Further arguments of published configs; each class gets those that it has."""


def table_cases() -> list:
    """(class name, arguments) of each class with a table, without repetitions; every second
    case of a class is `thorough`.
    """
    cases: dict[str, object] = {}
    for name in sorted(TABLES):
        known = inspect.signature(CLASSES[name]).parameters
        has_forms = "beta_start" in known
        forms = (*FORMS, *FURTHER_FORMS.get(name, ())) if has_forms else ()
        candidates = CONFIGS | {form: {"beta_schedule": form} for form in forms}
        whole = {label: c for label, c in candidates.items() if known.keys() >= c.keys()}
        partial = {
            label: {key: value for key, value in (STABLE_DIFFUSION | c).items() if key in known}
            for label, c in PARTIAL_CONFIGS.items()
            if has_forms and "beta_schedule" in known
        }
        for number, (label, arguments) in enumerate((whole | partial).items()):
            key = f"{name}-{sorted(arguments.items(), key=str)}"
            marks = pytest.mark.thorough if number % 2 else ()
            cases.setdefault(key, pytest.param(name, arguments, id=f"{name}-{label}", marks=marks))
    return list(cases.values())


def alphas_cumprod(scheduler: SchedulerMixin) -> torch.Tensor:
    """ᾱ of a scheduler, of shape (T,)."""
    if hasattr(scheduler, "alphas_cumprod"):
        return scheduler.alphas_cumprod.double()
    return scheduler.sqrt_alphas_cumprod.double() ** 2


def expected_alphas_cumprod(config: dict) -> np.ndarray:
    """ᾱ in extended precision from the definitions, with Algorithm 1 of Lin et al."""
    T = config.get("num_train_timesteps", 1000)
    form = config.get("beta_schedule", "squaredcos_cap_v2")
    share = np.arange(T, dtype=np.longdouble) / (T - 1)
    start = np.longdouble(config.get("beta_start", 0))
    end = np.longdouble(config.get("beta_end", 0))
    if config.get("trained_betas") is not None:
        betas = np.array(config["trained_betas"], dtype=np.longdouble)
    elif form == "squaredcos_cap_v2":
        bar = np.cos((np.arange(T + 1, dtype=np.longdouble) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    elif form == "exp":
        betas = np.ones(T) * (1 - np.exp(np.longdouble(-12) / T))
    elif form == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(6 - 12 * share))
    elif form == "scaled_linear":
        betas = (np.sqrt(start) + (np.sqrt(end) - np.sqrt(start)) * share) ** 2
    else:
        betas = start + (end - start) * share
    bar = np.cumprod(1 - betas)
    s = config.get("snr_shift_scale", 1)
    bar = bar / (s + (1 - s) * bar)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bar


@pytest.mark.parametrize(("name", "arguments"), table_cases())
def test_a_table_has_the_alpha_bar_of_diffusers_and_an_exact_lambda(name, arguments):
    scheduler = CLASSES[name](**arguments)
    schedule = schedule_from_diffusers(config(scheduler))
    logsnr = schedule.logsnr(index_times(schedule.steps))
    torch.testing.assert_close(logsnr.sigmoid(), alphas_cumprod(scheduler), rtol=0, atol=1e-6)
    with np.errstate(divide="ignore"):
        bar = expected_alphas_cumprod(config(scheduler))
        expected = np.log(bar) - np.log1p(-bar)
    np.testing.assert_allclose(logsnr, expected.astype(float), rtol=0, atol=1e-9)
    assert schedule.scaling == "vp"


def test_the_consistency_decoder_has_a_table_of_1024_entries():
    schedule = schedule_from_diffusers({"_class_name": "ConsistencyDecoderScheduler"})
    assert schedule == Discrete("cosine", 1024)


def test_laplace_is_the_distribution_of_the_paper_and_not_the_table_of_diffusers():
    scheduler = CLASSES["DDPMScheduler"](beta_schedule="laplace")
    published = scheduler.alphas_cumprod.double().logit()
    assert published.median().item() == pytest.approx(0.882, abs=0.001)
    assert (published.abs() < 0.5).double().mean().item() == pytest.approx(0.186, abs=0.001)
    schedule = schedule_from_diffusers(config(scheduler))
    assert schedule == Laplace(0.0, 0.5)
    assert schedule.logsnr(0.5) == 0
    assert schedule.cdf(0.5) - schedule.cdf(-0.5) == pytest.approx(1 - math.exp(-1), abs=1e-12)
    table = Discrete(tuple(scheduler.betas.tolist()))
    torch.testing.assert_close(table.logsnr(index_times(table.steps)), published, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "UniPCMultistep"]
)
def test_zero_terminal_snr_is_exact_where_diffusers_has_2_to_the_minus_24(name):
    scheduler = CLASSES[f"{name}Scheduler"](rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 2**-24
    assert scheduler.betas[-1] == 1
    assert math.log(2**-24) == pytest.approx(-16.64, abs=0.01)
    schedule = schedule_from_diffusers(config(scheduler))
    assert schedule.logsnr(1.0) == -math.inf
    assert schedule.level(1.0).alpha == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, 1.66e-4),
        ({"beta_schedule": "squaredcos_cap_v2"}, 5.28e-4),
        ({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}, 1.03e-3),
    ],
    ids=["linear", "cosine", "zero terminal SNR"],
)
def test_the_float32_tables_of_diffusers_lose_digits_of_lambda_at_the_clean_end(arguments, error):
    scheduler = CLASSES["DDPMScheduler"](**arguments)
    schedule = schedule_from_diffusers(config(scheduler))
    logsnr = schedule.logsnr(index_times(schedule.steps))
    errors = (alphas_cumprod(scheduler).logit() - logsnr).abs()[:-1]
    assert errors.argmax() == 0
    assert errors.max().item() == pytest.approx(error, rel=0.2)
