"""With path=True every stochastic sampler draws its noise from the path, or refuses."""

import dataclasses
import inspect
import math
from itertools import pairwise

import pytest
import torch

import diffcore.editing.inpainting
from diffcore.core.noise import Noise
from diffcore.distillation.flow_map import FlowMap
from diffcore.editing.inpainting import RePaint
from diffcore.samplers import DDIM, EulerAncestral, GradientEstimation, Heun, Sampler
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import Trailing, UniformLogSNR
from tests.helpers.oracles import mixture
from tests.samplers.test_orders import concrete_subclasses

ORACLE = mixture()
AMOUNTS = {"eta": 1.0, "mu": 0.5, "churn": 3.0, "variance": 1.0}
"""Fields of samplers that set the amount of fresh noise."""

IMAGE, MASK = torch.tensor([0.7, 9.0], dtype=torch.float64), torch.tensor([True, False])
ARGUMENTS = {RePaint: (DDIM(1.0), IMAGE, MASK, 2, 2)}
"""Arguments of the samplers that have no defaults."""

EDITING = {
    value
    for value in vars(diffcore.editing.inpainting).values()
    if inspect.isclass(value) and issubclass(value, Sampler) and not inspect.isabstract(value)
}
CLASSES = sorted(concrete_subclasses(Sampler) | EDITING, key=lambda cls: cls.__name__)


class PathNoise(Noise):
    """Noise of a path that counts its draws; noise that is keyed by a step is an error."""

    drawn = 0

    def step(self, index):
        raise AssertionError("noise keyed by the number of the step")

    def between(self, t, s, step):
        PathNoise.drawn += 1
        return super().between(t, s, step)


def stochastic(cls):
    """A sampler of the class with fresh noise, as far as its fields permit."""
    sampler = cls(*ARGUMENTS.get(cls, ()))
    names = {field.name for field in dataclasses.fields(sampler)}
    changes = {name: value for name, value in AMOUNTS.items() if name in names}
    return dataclasses.replace(sampler, **changes)


def denoiser_for(sampler):
    """The oracle, or its flow map for samplers that need one."""
    is_few_step = "posterior_mean" not in sampler.estimates
    return FlowMap(ORACLE, "mean_velocity", steps=2) if is_few_step else ORACLE


def run(sampler, grid, noise):
    knots = grid.knots(ORACLE.process.schedule, 8)
    return integrate(denoiser_for(sampler), sampler, noise.start(), knots, noise)[0]


def depends_on_noise(sampler):
    """Whether the samples from one start differ between two noises."""
    noise = Noise(torch.arange(4), (2,), dtype=torch.float64)
    knots = UniformLogSNR(-5.0, 4.0).knots(ORACLE.process.schedule, 8)
    ends = [
        integrate(denoiser_for(sampler), sampler, noise.start(), knots, of_run)[0]
        for of_run in (noise, noise.branch(0))
    ]
    return not torch.equal(*ends)


@pytest.mark.parametrize("grid", [Trailing(), UniformLogSNR(-5.0, 4.0)], ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_sampler_that_draws_noise_draws_it_from_the_path(cls, grid):
    sampler, PathNoise.drawn = stochastic(cls), 0
    noise = PathNoise(torch.arange(4), (2,), dtype=torch.float64, path=True)
    if hasattr(sampler, "churn"):
        with pytest.raises(ValueError, match=r"path=True has no .*: use path=False, or EulerAnc"):
            run(sampler, grid, noise)
        return
    assert run(sampler, grid, noise).isfinite().all()
    assert (PathNoise.drawn > 0) == depends_on_noise(sampler)


def test_the_samplers_with_fresh_noise_are_those_known():
    names = {cls.__name__ for cls in CLASSES if depends_on_noise(stochastic(cls))}
    assert names == {
        "AlphaBlending",
        "Consistency",
        "DDIM",
        "DDPM",
        "DPMSolverSDE",
        "Euler",
        "EulerAncestral",
        "GradientEstimation",
        "Heun",
        "PredictorCorrector",
        "RePaint",
        "Restart",
        "TCD",
    }


def test_churn_with_a_path_is_refused_before_any_evaluation_and_its_remedies_sample():
    arguments = {"steps": 4, "seeds": [1]}
    with pytest.raises(ValueError, match="use path=False, or EulerAncestral"):
        sample(ORACLE, Heun(2.0), path=True, **arguments)
    assert sample(ORACLE, Heun(2.0), **arguments).x.isfinite().all()
    assert sample(ORACLE, EulerAncestral(), path=True, **arguments).x.isfinite().all()


def test_the_noise_of_gradient_estimation_is_the_increment_of_the_path():
    """γ = 1 with μ = ½ is the ancestral step of DDPM, with the same noise."""
    noise = Noise(torch.arange(4), (2,), dtype=torch.float64, path=True)
    ends = [run(s, Trailing(), noise) for s in (GradientEstimation(1.0, 0.5), DDIM(1.0))]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_known_pixels_on_a_path_are_its_standard_normal_values():
    noise = Noise(torch.arange(400), (2,), dtype=torch.float64, path=True)
    drawn = {}

    def record(step, state, _):
        drawn[step] = (state.x[:, 0] - state.level.alpha * IMAGE[0]) / state.level.sigma

    knots = UniformLogSNR(-5.0, 4.0).knots(ORACLE.process.schedule, 12)
    sampler = RePaint(DDIM(), IMAGE, MASK, 1, 1)
    integrate(ORACLE, sampler, noise.start(), knots, noise, callback=record)
    z = torch.stack([drawn[step] for step in range(1, 12)])
    assert z.std(1) == pytest.approx(torch.ones(11), abs=0.15)
    between = [math.exp(a.logsnr - b.logsnr) ** 0.5 for a, b in pairwise(knots[1:12])]
    correlation = [torch.corrcoef(z[i : i + 2])[0, 1].item() for i in range(10)]
    assert correlation == pytest.approx(between, abs=0.2)
