"""The levels of `from_config` are those that the scheduler of diffusers lists itself."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch

from diffcore.core.process import TimeConditioning
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcoreGuider, DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_grid import SchedulerGrid
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import DDIM, Consistency, Heun
from diffcore.schedules import Discrete, Flow, Karras, Leading, Shifted, Trailing, Within
from tests.helpers.products import covered

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # theirs, in set_timesteps
TABLES = (
    *("DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
    *("KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep"),
    *("DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"),
)
FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SETTINGS = [
    *({"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")),
    {"timestep_spacing": "leading", "steps_offset": 1},
    *({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")),
    {"use_lu_lambdas": True},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    FLOW,
    ZERO | {"timestep_spacing": "trailing"},
    {"shift": 3.0},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"shift_terminal": 0.02, "shift": 2.0},
]


def scheduler_class(kind):
    return getattr(diffusers, f"{kind}Scheduler")


def accepts(kind, options):
    return options.keys() <= inspect.signature(scheduler_class(kind).__init__).parameters.keys()


CASES = [
    (kind, options)
    for kind in (*TABLES, *FLOWS)
    for options in SETTINGS
    if accepts(kind, options) and not (kind in FLOWS and "timestep_spacing" in options)
] + [("EDMEuler", {}), ("EDMDPMSolverMultistep", {"sigma_schedule": "exponential"})]


def listed_sigmas(kind, scheduler, steps):
    """The distinct noise levels that diffusers lists, from its sigmas or from its timesteps."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        sigmas = np.array([float(sigma) for sigma in scheduler.sigmas[:-1] if sigma > 0])
    else:
        alpha_bars = scheduler.alphas_cumprod.double()
        times = [int(t) for t in dict.fromkeys(scheduler.timesteps.tolist())]
        sigmas = ((1 - alpha_bars) / alpha_bars).sqrt()[sorted(times, reverse=True)].numpy()
    return np.array(list(dict.fromkeys(sigmas.tolist())))


@pytest.mark.parametrize(("kind", "options"), covered(CASES, 14), ids=str)
def test_the_levels_are_those_of_the_schedulers_own_list(kind, options):
    if kind == "PNDM":
        options = options | {"skip_prk_steps": True}
    other = scheduler_class(kind)(**options)
    ours = DiffcoreScheduler.from_config(other)
    assert from_spec(type(ours.settings), to_spec(ours.settings)) == ours.settings
    for steps in (4, 5, 7, 30):
        ours.set_timesteps(steps)
        expected = listed_sigmas(kind, other, steps)
        found = ours.sigmas[:-1].double().numpy()
        if "rescale_betas_zero_snr" in options:  # some tables of diffusers end at ᾱ = 2^-24
            assert found[0] == math.inf
            found, expected = found[1:], expected[1:]
        if "timestep_spacing" in options and "Solver" not in kind:
            # Between the entries of its table diffusers interpolates σ/α.
            assert np.abs(np.log(found / expected)).max() < 5e-3
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_config_without_a_class_is_that_of_the_class_with_its_options():
    for kind in ("UniPCMultistep", "DDIM", "SASolver"):
        other = scheduler_class(kind)(timestep_spacing="leading")
        grids = [
            DiffcoreScheduler.from_config(source).settings.grid for source in (other, other.config)
        ]
        assert grids[0] == grids[1]
    with pytest.raises(ValueError, match=r"FlowMatchHeunDiscreteScheduler, whose levels differ"):
        DiffcoreScheduler.from_config(diffusers.FlowMatchHeunDiscreteScheduler().config)


def test_the_timesteps_of_a_multistep_solver_are_its_own():
    config = diffusers.DPMSolverMultistepScheduler(
        timestep_spacing="leading", steps_offset=1
    ).config
    ours = DiffcoreScheduler.from_config(config)
    ours.set_timesteps(4)
    assert ours.timesteps.tolist() == [801, 601, 401, 201]
    ours = DiffcoreScheduler.from_config(diffusers.DPMSolverMultistepScheduler().config)
    ours.set_timesteps(4)
    assert ours.timesteps.tolist() == [999, 749, 500, 250]


@pytest.mark.parametrize("kind", ("exponential", "linear"))
@pytest.mark.parametrize("terminal", (None, 0.05))
def test_a_dynamic_shift_gives_the_sigmas_of_the_scheduler(kind, terminal):
    other = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal
    )
    ours = DiffcoreScheduler.from_config(other.config)
    for arguments in ({"num_inference_steps": 5}, {"sigmas": np.linspace(1, 1 / 6, 6)}):
        for scheduler in (ours, other):
            scheduler.set_timesteps(mu=0.8, **arguments)
        torch.testing.assert_close(ours.sigmas, other.sigmas, rtol=1e-4, atol=1e-6)


def test_sigmas_are_those_of_each_evaluation_and_end_at_clean_data():
    ours = DiffcoreScheduler(Heun(), Karras(0.1, 10.0))
    ours.set_timesteps(2)
    assert ours.sigmas.tolist() == pytest.approx([10.0, 0.1, 0.1, 0.0])
    assert len(ours.sigmas) == len(ours.timesteps) + 1
    flow = DiffcoreScheduler(
        DDIM(), Trailing(), Flow(), "flow_prediction", TimeConditioning("blend")
    )
    flow.set_timesteps(4)
    assert flow.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


ABSENT = {"schedule": Discrete(), "prediction_type": "epsilon", "time": TimeConditioning()}
FLOW_KARRAS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}
GIVEN = [
    ({"_class_name": "DDPMScheduler", "thresholding": True}, {"clip": 1.0}),
    (FLOW_KARRAS | {"invert_sigmas": True}, ABSENT | {"grid": Within(Trailing(), high=5.0)}),
    ({"_class_name": "DDIMInverseScheduler"}, {"grid": Trailing()}),
    ({"_class_name": "ScoreSdeVpScheduler"}, ABSENT | {"grid": Trailing(), "last": None}),
    ({"_class_name": "LCMScheduler"}, {"sampler": Consistency(), "grid": Trailing()}),
    (
        {"_class_name": "EDMEulerScheduler", "final_sigmas_type": "sigma_min"},
        {"last": None},
    ),
]


@pytest.mark.parametrize(("config", "given"), GIVEN, ids=str)
def test_what_is_given_is_not_read_from_the_config(config, given):
    settings = DiffcoreScheduler.from_config(config, **given).settings
    assert {name: getattr(settings, name) for name in given} == given
    with pytest.raises(ValueError, match=r"pass|is its table|no time conditioning"):
        DiffcoreScheduler.from_config(config)


@pytest.mark.parametrize("kind", ("LCM", "TCD", "FlowMatchLCM"))
def test_a_scheduler_of_consistency_models_is_refused_with_what_to_pass(kind):
    config = scheduler_class(kind)().config
    for given in ({}, {"grid": Trailing()}, {"sampler": DDIM()}):
        with pytest.raises(ValueError, match=rf"{kind}Scheduler samples a distilled network .* "):
            DiffcoreScheduler.from_config(
                dict(config) | {"_class_name": f"{kind}Scheduler"}, **given
            )
    ours = DiffcoreGuider.of(CFG(2.0), scheduler_class(kind)())
    assert ours.settings.rule == CFG(2.0)


def test_a_grid_names_a_scheduler_of_diffusers():
    with pytest.raises(ValueError, match="scheduler is 'UNet2DModel', expected one of diffusers"):
        SchedulerGrid("UNet2DModel")
    with pytest.raises(ValueError, match=r"DDIMInverseScheduler lists 4 levels .* less noisy"):
        SchedulerGrid("DDIMInverseScheduler").knots(Discrete(), 4)


def test_a_named_grid_is_chosen_where_it_gives_the_list():
    for kind, options, grid in (
        ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, Leading(1)),
        ("DPMSolverMultistep", {"timestep_spacing": "trailing"}, Trailing()),
    ):
        config = scheduler_class(kind)(**options).config
        assert DiffcoreScheduler.from_config(config).settings.grid == grid
    shifted = DiffcoreScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    ).settings
    assert shifted.schedule == Shifted.by_time_shift(Flow(), 3.0)
    assert isinstance(shifted.grid, SchedulerGrid)
