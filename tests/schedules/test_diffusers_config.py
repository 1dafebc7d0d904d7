"""Every scheduler class of diffusers: its levels read from its config, against its own tables and a
float64 recomputation.
"""

import importlib
import inspect
import json
import math
import pkgutil
import sys
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, schedulers

from diffcore.schedules import (
    Cosine,
    Discrete,
    Flow,
    Laplace,
    LogLinear,
    Rho,
    Schedule,
    Shifted,
    ZeroTerminalSNR,
    schedule_from_diffusers,
)
from diffcore.schedules.diffusers_config import ANGLES, FLOWS, REFUSED, SIGMAS, TABLES

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_:DeprecationWarning"
)  # numpy's, of how diffusers uses it


def scheduler_classes() -> dict[str, type]:
    """All that the package defines, those that need torchsde to sample included."""
    found: dict[str, type] = {}
    with patch.dict(sys.modules, torchsde=sys.modules.get("torchsde", ModuleType("torchsde"))):
        for entry in pkgutil.walk_packages(schedulers.__path__, f"{schedulers.__name__}."):
            members = vars(importlib.import_module(entry.name)).items()
            found |= {
                name: cls
                for name, cls in members
                if inspect.isclass(cls)
                and issubclass(cls, ConfigMixin)
                and cls.__module__ == entry.name
            }
    return found


CLASSES = scheduler_classes()
FORMS = ("linear", "scaled_linear", "squaredcos_cap_v2")
MORE = {
    "DDPMScheduler": ("sigmoid",),
    "DDPMParallelScheduler": ("sigmoid",),
    "RePaintScheduler": ("sigmoid",),
    "HeunDiscreteScheduler": ("exp",),
}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
CONFIGS = {
    "defaults": {},
    "steps": {"num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.4},
    "sd15": SD | {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False},
    "sdxl": SD
    | {"timestep_spacing": "leading", "use_karras_sigmas": False, "interpolation_type": "linear"},
    "sd21-zsnr": SD
    | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "zsnr": {"rescale_betas_zero_snr": True},
    "trained": {"trained_betas": np.linspace(0.01, 0.3, 20) ** 1.5, "num_train_timesteps": 20},
}


def arguments(name: str, wanted: dict) -> dict:
    known = inspect.signature(CLASSES[name]).parameters
    return {key: value for key, value in wanted.items() if key in known}


def table_cases() -> list[tuple[str, dict]]:
    cases: dict[str, tuple[str, dict]] = {}
    for name in TABLES:
        known = inspect.signature(CLASSES[name]).parameters
        forms = FORMS + MORE.get(name, ()) if "beta_start" in known else ()
        for label, wanted in [
            *CONFIGS.items(),
            *((form, {"beta_schedule": form}) for form in forms),
        ]:
            kept = arguments(name, wanted)
            if len(kept) == len(wanted) or (
                label.startswith("sd") and "beta_schedule" in kept and forms
            ):
                cases.setdefault(f"{name}-{sorted(kept.items(), key=str)}", (name, kept))
    return list(cases.values())


def config(scheduler) -> dict:
    """What scheduler_config.json holds."""
    return json.loads(scheduler.to_json_string())


def table(scheduler) -> torch.Tensor:
    """Their ᾱ."""
    if hasattr(scheduler, "alphas_cumprod"):
        return scheduler.alphas_cumprod.double()
    return scheduler.sqrt_alphas_cumprod.double() ** 2


def recomputed(config: dict) -> np.ndarray:
    """ᾱ in extended precision from the definitions, and Algorithm 1 of Lin et al. on it."""
    T, form = (
        config.get("num_train_timesteps", 1000),
        config.get("beta_schedule", "squaredcos_cap_v2"),
    )
    share = np.arange(T, dtype=np.longdouble) / (T - 1)
    start, end = (
        np.longdouble(config.get("beta_start", 0)),
        np.longdouble(config.get("beta_end", 0)),
    )
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


def index_times(schedule: Schedule) -> torch.Tensor:
    return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps


@pytest.mark.parametrize(("name", "kept"), table_cases(), ids=lambda value: str(value)[:60])
def test_every_table_is_theirs_in_alpha_bar_and_exact_in_lambda(name, kept):
    scheduler = CLASSES[name](**kept)
    schedule = schedule_from_diffusers(config(scheduler))
    logsnr = schedule.logsnr(index_times(schedule))
    torch.testing.assert_close(logsnr.sigmoid(), table(scheduler), rtol=0, atol=1e-6)
    with np.errstate(divide="ignore"):
        bar = recomputed(config(scheduler))
        expected = np.log(bar) - np.log1p(-bar)
    np.testing.assert_allclose(logsnr, expected.astype(float), rtol=0, atol=1e-9)
    assert schedule.scaling == "vp"


PLAIN = {*TABLES, *FLOWS} - {
    "ConsistencyDecoderScheduler",  # has no beta_start to say
    "HeliosScheduler",  # three resolutions
    "HeliosDMDScheduler",
    "RFD4ProteinaScheduler",  # has no defaults
}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_a_config_leaves_out_is_the_default_of_its_class(name):
    assert schedule_from_diffusers({"_class_name": name}) == schedule_from_diffusers(
        config(CLASSES[name]())
    )


def test_the_consistency_decoder_has_a_table_of_1024():
    assert schedule_from_diffusers({"_class_name": "ConsistencyDecoderScheduler"}) == Discrete(
        "cosine", 1024
    )


def test_every_class_of_the_package_is_read_or_refused_and_no_other():
    assert sorted(CLASSES) == sorted([*TABLES, *FLOWS, *ANGLES, *SIGMAS, *REFUSED])


def test_the_published_configs_read_as_their_papers_schedules():
    stable = Discrete("scaled_linear", 1000, 0.00085, 0.012)
    assert schedule_from_diffusers({"_class_name": "PNDMScheduler"} | CONFIGS["sd15"]) == stable
    assert (
        schedule_from_diffusers({"_class_name": "EulerDiscreteScheduler"} | CONFIGS["sdxl"])
        == stable
    )
    assert schedule_from_diffusers(
        {"_class_name": "DDIMScheduler"} | CONFIGS["sd21-zsnr"]
    ) == ZeroTerminalSNR(stable)
    assert schedule_from_diffusers(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    ) == Shifted(Flow(), -2 * math.log(3))
    assert schedule_from_diffusers(
        {"_class_name": "CogVideoXDPMScheduler", "rescale_betas_zero_snr": True}
    ) == ZeroTerminalSNR(Shifted(stable, -math.log(3)))


FLUX = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "max_image_seq_len": 4096,
}
SHIFTS = [1.0, 3.0, 12.0, 0.4]  # 3: SD3


def shifted(s: float, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SD3's time shift (2403.03206, eq. 23), σ and the λ of a process with α = 1 - σ."""
    a = np.asarray(a, dtype=np.longdouble)
    sigma = s * a / (1 + (s - 1) * a)
    with np.errstate(divide="ignore"):
        return sigma, (2 * np.log((1 - a) / (s * a))).astype(float)


def check_flow(schedule: Schedule, s: float, a: np.ndarray, theirs) -> None:
    """Our levels at t = a: their σ to 1e-6, the formula's λ to 1e-9."""
    sigma, logsnr = shifted(s, a)
    level = schedule.level(torch.tensor(np.array(a, dtype=float)))
    assert schedule.scaling == "flow"
    np.testing.assert_allclose(level.sigma, np.asarray(theirs, dtype=float), rtol=0, atol=1e-6)
    np.testing.assert_allclose(level.sigma, sigma.astype(float), rtol=1e-14)
    np.testing.assert_allclose(level.logsnr, logsnr, rtol=0, atol=1e-9)


@pytest.mark.parametrize("s", SHIFTS)
@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"],
)
def test_flow_tables_are_the_shifted_flow_at_their_indices(name, s):
    scheduler = CLASSES[name](shift=s)
    check_flow(
        schedule_from_diffusers(config(scheduler)),
        s,
        np.arange(1000, 0, -1) / 1000,
        scheduler.sigmas,
    )


@pytest.mark.parametrize("s", SHIFTS)
@pytest.mark.parametrize(
    "name", ["FlowMapEulerDiscreteScheduler", "MiniMaxH3Scheduler", "PiflowScheduler"]
)
def test_flow_schedulers_that_only_sample_visit_levels_of_the_shifted_flow(name, s):
    scheduler = CLASSES[name](shift=s)
    scheduler.set_timesteps(9)
    a = {
        "FlowMapEulerDiscreteScheduler": np.linspace(1, 0, 10),
        "MiniMaxH3Scheduler": np.linspace(1, 0, 9),
        "PiflowScheduler": np.append(1 - np.arange(9) / 8.5, 0),
    }[name]
    check_flow(schedule_from_diffusers(config(scheduler)), s, a[:-1], scheduler.sigmas[:-1])
    assert scheduler.sigmas[-1] == 0 == schedule_from_diffusers(config(scheduler)).level(0.0).sigma


@pytest.mark.parametrize("name", ["HeliosScheduler", "HeliosDMDScheduler"])
def test_helios_is_a_shifted_flow_at_one_resolution_and_refused_as_a_pyramid(name):
    scheduler = CLASSES[name](stages=1, stage_range=[0, 1], shift=5.0)
    a = (1 - np.linspace(1, 1 / 1000, 1001))[:0:-1]
    check_flow(schedule_from_diffusers(config(scheduler)), 5.0, a, scheduler.sigmas)
    with pytest.raises(ValueError, match="stages is 3, expected 1"):
        schedule_from_diffusers(config(CLASSES[name]()))
    s = 2.0 if name == "HeliosDMDScheduler" else math.exp(2.0)
    dynamic = {"_class_name": name, "stages": 1, "use_dynamic_shifting": True}
    assert schedule_from_diffusers(dynamic, mu=2.0) == Shifted(Flow(), -2 * math.log(s))
    assert scheduler.config.time_shift_type == ("linear" if s == 2 else "exponential")


SOLVERS = [
    "DPMSolverMultistep",
    "DPMSolverMultistepInverse",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DEISMultistep",
]


@pytest.mark.parametrize("s", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("name", [*SOLVERS, "SASolver"])
def test_use_flow_sigmas_is_the_shifted_flow_whatever_the_beta_table(name, s):
    scheduler = CLASSES[f"{name}Scheduler"](
        use_flow_sigmas=True, flow_shift=s, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(8)
    if name == "UniPCMultistep":
        a, off = np.linspace(1, 1 / 1000, 9)[:-1], np.array([1e-6, *[0] * 7])
    else:  # begins at a = 1 - 1/T, not at pure noise
        a, off = (1 - np.linspace(1, 1 / 1000, 9))[:0:-1], 0
    check_flow(
        schedule_from_diffusers(config(scheduler)),
        s,
        a,
        np.asarray(scheduler.sigmas[:8], dtype=float) + off,
    )


@pytest.mark.parametrize("mu", [0.5, 1.15])
@pytest.mark.parametrize(("kind", "s"), [("exponential", math.exp), ("linear", float)])
def test_dynamic_shifting_takes_the_mu_of_the_picture(kind, s, mu):
    scheduler = CLASSES["FlowMatchEulerDiscreteScheduler"](**FLUX, time_shift_type=kind)
    scheduler.set_timesteps(28, mu=mu)
    schedule = schedule_from_diffusers(config(scheduler), mu=mu)
    check_flow(schedule, s(mu), np.linspace(1, 1 / 1000, 28), scheduler.sigmas[:-1])
    with pytest.raises(ValueError, match="use_dynamic_shifting is set: give mu"):
        schedule_from_diffusers(config(scheduler))


@pytest.mark.parametrize(
    "name", ["UniPCMultistep", "DPMSolverMultistep", "DEISMultistep", "DPMSolverSinglestep"]
)
def test_dynamic_shifting_of_the_solvers_is_exponential(name):
    scheduler = CLASSES[f"{name}Scheduler"](use_flow_sigmas=True, use_dynamic_shifting=True)
    scheduler.set_timesteps(8, mu=0.9)
    noisiest = 1 - 1e-6 if name == "UniPCMultistep" else 1 - 1 / 1000
    check_flow(
        schedule_from_diffusers(config(scheduler), mu=0.9),
        math.exp(0.9),
        [noisiest],
        scheduler.sigmas[:1],
    )


def test_ltx_and_proteina_are_flows():
    scheduler = CLASSES["LTXEulerAncestralRFScheduler"]()
    scheduler.set_timesteps(10)
    check_flow(
        schedule_from_diffusers(config(scheduler)),
        1.0,
        np.linspace(1, 1 / 1000, 10),
        scheduler.sigmas[:-1],
    )
    protein = CLASSES["RFD4ProteinaScheduler"]("log", "tan", 1.0, 1.0)
    ones, zeros = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    sigma = protein.add_noise(zeros, ones, 0.7).mean()  # their 0.7 is 0.7 of data
    check_flow(schedule_from_diffusers(config(protein)), 1.0, [0.3], [sigma])


def test_angles_are_cosine_at_the_time_that_the_network_is_told():
    danced = CLASSES["IPNDMScheduler"]()
    danced.set_timesteps(50)
    schedule = schedule_from_diffusers(config(danced))
    torch.testing.assert_close(
        schedule.level(danced.timesteps).sigma.float(), danced.betas[:-1], rtol=0, atol=1e-6
    )
    audio = CLASSES["CosineDPMSolverMultistepScheduler"]()
    level = schedule_from_diffusers(config(audio)).level(audio.timesteps)
    torch.testing.assert_close(
        level.ratio.float(), audio.sigmas[:-1], rtol=3e-4, atol=0
    )  # their float32 near t = 1
    assert level.schedule == Cosine(scaling="ve")
    trig = CLASSES["SCMScheduler"]()
    trig.set_timesteps(3, intermediate_timesteps=None, max_timesteps=1.5)
    level = schedule_from_diffusers(config(trig)).level(trig.timesteps[0].item() * 2 / math.pi)
    assert (level.alpha, level.sigma) == pytest.approx((math.cos(1.5), math.sin(1.5)), abs=1e-6)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_is_its_range_of_sigma_in_the_spacing_of_its_grid(name, spacing):
    scheduler = CLASSES[name](sigma_schedule=spacing, sigma_max=120.0)
    schedule = schedule_from_diffusers(config(scheduler))
    level = schedule.level(torch.linspace(1, 0, len(scheduler.sigmas) - 1, dtype=torch.float64))
    torch.testing.assert_close(level.ratio, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-6)
    assert schedule.scaling == "ve"


def test_other_schedulers_of_bounded_sigma():
    consistency = CLASSES["CMStochasticIterativeScheduler"]()
    level = schedule_from_diffusers(config(consistency)).level(
        torch.linspace(1, 0, 40, dtype=torch.float64)
    )
    torch.testing.assert_close(level.ratio, consistency.sigmas.double(), rtol=1e-5, atol=1e-6)
    assert schedule_from_diffusers(config(CLASSES["ScoreSdeVeScheduler"]())) == LogLinear.ve(
        0.01, 1348.0
    )
    assert schedule_from_diffusers({"_class_name": "KarrasVeScheduler"}) == LogLinear.ve(
        0.02, 100.0
    )
    video = {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    }
    euler = CLASSES["EulerDiscreteScheduler"](**video, use_karras_sigmas=True)
    euler.set_timesteps(25)
    level = schedule_from_diffusers(config(euler)).level(
        torch.linspace(1, 0, 25, dtype=torch.float64)
    )
    torch.testing.assert_close(level.ratio, euler.sigmas[:-1].double(), rtol=1e-5, atol=1e-6)
    assert schedule_from_diffusers(
        config(CLASSES["EulerDiscreteScheduler"](**video, use_exponential_sigmas=True))
    ) == (LogLinear.ve(0.002, 700.0))
    assert schedule_from_diffusers({"_class_name": "EDMEulerScheduler"}) == Rho()


# Where diffusers is not what it means to be.


def test_A4_laplace_is_the_papers_and_not_their_square_root():
    scheduler = CLASSES["DDPMScheduler"](beta_schedule="laplace")
    theirs = scheduler.alphas_cumprod.double().logit()
    assert theirs.median().item() == pytest.approx(0.882, abs=0.001)
    assert (theirs.abs() < 0.5).double().mean().item() == pytest.approx(0.186, abs=0.001)
    schedule = schedule_from_diffusers(config(scheduler))
    assert schedule == Laplace(0.0, 0.5)
    assert schedule.logsnr(0.5) == 0
    assert schedule.cdf(0.5) - schedule.cdf(-0.5) == pytest.approx(1 - math.exp(-1), abs=1e-12)
    as_trained = Discrete(tuple(scheduler.betas.tolist()))
    torch.testing.assert_close(
        as_trained.logsnr(index_times(as_trained)), theirs, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "name", ["EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"]
)
def test_A1_zero_terminal_snr_is_zero_and_not_2_to_the_minus_24(name):
    scheduler = CLASSES[f"{name}Scheduler"](rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 2**-24
    assert scheduler.betas[-1] == 1
    assert math.log(2**-24) == pytest.approx(-16.64, abs=0.01)
    schedule = schedule_from_diffusers(config(scheduler))
    assert schedule.logsnr(1.0) == -math.inf
    assert schedule.level(1.0).alpha == 0


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"]
)
def test_the_cleanest_flow_level_is_shifted_once_and_not_twice(name):
    scheduler = CLASSES[f"{name}Scheduler"](shift=3.0)
    ours = schedule_from_diffusers(config(scheduler)).level(1 / 1000).sigma
    assert ours == pytest.approx(3 / 1002, rel=1e-12)
    assert scheduler.sigma_min == pytest.approx(ours, rel=1e-6)
    scheduler.set_timesteps(28)
    assert scheduler.sigmas[-2].item() == pytest.approx(0.00893, abs=1e-5)


@pytest.mark.parametrize(
    ("kept", "error"),
    [
        ({}, 1.66e-4),
        ({"beta_schedule": "squaredcos_cap_v2"}, 5.28e-4),
        ({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}, 1.03e-3),
    ],
    ids=["linear", "cosine", "zsnr"],
)
def test_their_float32_tables_lose_lambda_at_the_clean_end(kept, error):
    scheduler = CLASSES["DDPMScheduler"](**kept)
    schedule = schedule_from_diffusers(config(scheduler))
    off = (table(scheduler).logit() - schedule.logsnr(index_times(schedule))).abs()[:-1]
    assert off.argmax() == 0
    assert off.max().item() == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("name", REFUSED)
def test_classes_without_a_schedule_here_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=name) as caught:
        schedule_from_diffusers({"_class_name": name})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "mu", "message"),
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
def test_configs_that_say_no_schedule_are_refused(given, mu, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_diffusers(given, mu)
