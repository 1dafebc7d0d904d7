"""The config of each scheduler of diffusers is read as schedule, prediction type and sampler."""

import json
import math

import diffusers
import pytest

from diffcore.core.process import TimeConditioning
from diffcore.integrations.diffusers import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_grid import SchedulerGrid
from diffcore.schedules import (
    Discrete,
    Flow,
    Karras,
    Leading,
    Linspace,
    Shifted,
    Trailing,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # theirs, in set_timesteps


BETA_SIGMAS = (("use_beta_sigmas", True),)
INDEX_0 = Discrete().logsnr(1e-3)
CONFIGS = [
    ("DDIM", {}, {"grid": Leading(), "clip": 1.0, "schedule": Discrete()}),
    (
        "DDPM",
        {"timestep_spacing": "linspace", "clip_sample": False},
        {"grid": Linspace(), "clip": None},
    ),
    (
        "DDIM",
        {"clip_sample_range": 2.0, "timestep_spacing": "trailing"},
        {"grid": Trailing(), "clip": 2.0},
    ),
    ("PNDM", {"steps_offset": 1}, {"grid": Leading(1), "last": INDEX_0, "clip": None}),
    (
        "EulerDiscrete",
        {"use_beta_sigmas": True},
        {"grid": SchedulerGrid("EulerDiscreteScheduler", BETA_SIGMAS), "last": None},
    ),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, {"last": INDEX_0}),
    (
        "FlowMatchEulerDiscrete",
        {"shift": 3.0},
        {
            "grid": SchedulerGrid("FlowMatchEulerDiscreteScheduler", (("shift", 3.0),)),
            "schedule": Shifted(Flow(), -2 * math.log(3)),
        },
    ),
    (
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True, "max_shift": 1.3},
        {"schedule": Flow(), "time": TimeConditioning("blend")},
    ),
    ("EDMEuler", {}, {"grid": Karras(), "prediction_type": "edm", "sigma_data": 0.5}),
]


@pytest.mark.parametrize(("kind", "config", "expected"), CONFIGS, ids=str)
def test_the_config_of_any_scheduler_is_read(kind, config, expected):
    """As an object has it, as JSON, and as JSON with its defaults left out: always the same."""
    other = getattr(diffusers, f"{kind}Scheduler")(**config)
    for source in (
        other.config,
        json.loads(other.to_json_string()),
        {"_class_name": f"{kind}Scheduler"} | config,
    ):
        ours = DiffcoreScheduler.from_config(source)
        assert {name: getattr(ours.settings, name) for name in expected} == expected
        for name in ("use_dynamic_shifting", "max_shift"):
            assert ours.config[name] == config.get(name, ours.config[name])


@pytest.mark.parametrize("flag", ("use_karras_sigmas", "use_exponential_sigmas"))
def test_levels_even_in_the_noise_are_the_grids_of_that_name(flag):
    other = diffusers.EulerDiscreteScheduler(**{flag: True})
    ours = DiffcoreScheduler.from_config(other.config)
    for scheduler in (ours, other):
        scheduler.set_timesteps(5)
    assert [knot.ratio for knot in ours.call.plan.knots(0)] == pytest.approx(
        other.sigmas.tolist(), rel=1e-3
    )
