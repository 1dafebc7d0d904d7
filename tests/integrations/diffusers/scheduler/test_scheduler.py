"""The scheduler by itself: our own loop's samples from outside, levels, noise, configs, and what is
refused.
"""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.process import TimeConditioning
from diffcore.integrations.diffusers import DiffcoreScheduler, from_diffusers
from diffcore.samplers import (
    DDIM,
    DDPM,
    AdamsBashforth,
    AdaptiveRungeKutta,
    AlphaBlending,
    DPMSolverPP,
    Euler,
    EulerAncestral,
    Heun,
    Restart,
    UniPC,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import (
    Cosine,
    Discrete,
    Flow,
    Karras,
    Leading,
    Shifted,
    Trailing,
    UniformLogSNR,
    ZeroTerminalSNR,
)
from tests.helpers.products import sampled
from tests.helpers.tiny_pipelines import align_parameters, diffusers_loop, quiet, unet

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # theirs, in set_timesteps
SD = Discrete("scaled_linear", None, 0.00085, 0.012)
ZERO = ZeroTerminalSNR(Discrete())
FLOW = (Flow(), "flow_prediction", TimeConditioning("blend"))
SAMPLERS = [
    DDIM(),
    Heun(),
    AlphaBlending(1),
    AlphaBlending(2),
    DPMSolverPP("2M"),
    DPMSolverPP("2S"),
    DPMSolverPP("3M"),
    UniPC(2),
    AdamsBashforth.lms(3),
    Euler(),
]


def seed(number=0):
    return torch.Generator().manual_seed(number)


def scaled(a, b):
    """The greatest difference over the greatest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def knots_of(scheduler):
    return scheduler.call.plan.knots(0)


@pytest.mark.parametrize(
    ("sampler", "steps", "schedule"),
    sampled(SAMPLERS, (1, 5), (Discrete(), ZERO), count=20),
    ids=str,
)
def test_an_outside_loop_gives_the_samples_of_our_own(sampler, steps, schedule):
    scheduler = DiffcoreScheduler(sampler, Trailing(), schedule, "v_prediction")
    network, x = unet(), torch.randn(2, 3, 8, 8, generator=seed())
    knots = Trailing().knots(schedule, steps)
    with torch.no_grad():
        mine, count = integrate(
            from_diffusers(network, scheduler), sampler, x, knots, Noise(torch.arange(2), (3, 8, 8))
        )
    assert scaled(diffusers_loop(network, scheduler, steps, x), mine) < 1e-5
    assert len(scheduler.timesteps) == count == sampler.evaluations(knots)
    assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize("kind", ["learned_range", "fixed_small"])
def test_a_learned_variance_is_that_of_diffusers_ddpm(kind):
    """10 steps to index 0, where DDPMScheduler of diffusers adds no noise."""
    options = {"variance_type": kind, "clip_sample": False, "timestep_spacing": "leading"}
    theirs = diffusers.DDPMScheduler(**options)
    ours = DiffcoreScheduler.from_config(theirs, sampler=DDPM())
    assert ours.settings.process.variance == ("learned" if kind == "learned_range" else "fixed")
    x, results = torch.randn(2, 3, 8, 8, generator=seed()), []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        generator, y = seed(1), x
        for t in scheduler.timesteps:
            output = torch.cat([0.5 * y, 0.8 * y.sin()], 1)  # 2C channels
            output = output if kind == "learned_range" else output[:, :3]
            y = scheduler.step(output, t, y, generator=generator).prev_sample
        results.append(y)
    assert scaled(*results) < 1e-5


@pytest.mark.parametrize(
    ("sampler", "order", "expected"),
    [
        (DDIM(), 1, [999, 749, 499, 249]),
        (Heun(), 2, [999, 749, 749, 499, 499, 249, 249]),
        (AlphaBlending(2), 2, 8),
        (DPMSolverPP("2S"), 2, 7),
    ],
    ids=str,
)
def test_two_stage_samplers_announce_each_evaluation(sampler, order, expected):
    scheduler = DiffcoreScheduler(sampler)
    scheduler.set_timesteps(4)
    assert scheduler.order == order
    assert (
        scheduler.timesteps.tolist() if isinstance(expected, list) else len(scheduler.timesteps)
    ) == expected


def test_an_edm_network_receives_scaled_input():
    network, x = unet(), torch.randn(2, 3, 8, 8, generator=seed())
    other = diffusers.EDMEulerScheduler(sigma_data=0.6)
    scheduler = DiffcoreScheduler.from_config(other.config, sampler=Euler())
    scheduler.set_timesteps(4)
    assert scheduler.init_noise_sigma == pytest.approx(math.hypot(80, 0.6))  # theirs is √(σ² + 1)
    mine = diffusers_loop(
        network, scheduler, 4, x * other.init_noise_sigma / scheduler.init_noise_sigma
    )
    assert scaled(mine, diffusers_loop(network, other, 4, x)) < 1e-4


def begun(scheduler, network, begin, x, announced):
    scheduler.set_timesteps(4)
    if announced:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t.expand(2), return_dict=False)[0], t, x, return_dict=False)[
            0
        ]
    return x


@pytest.mark.parametrize(
    "sampler", (DDIM(), Heun(), AlphaBlending(2), DPMSolverPP("2S"), DPMSolverPP("2M")), ids=str
)
@torch.no_grad()
def test_a_call_may_begin_at_any_evaluation(sampler):
    """Inside a step the first-order step finishes it; what follows is a run from its end."""
    scheduler = DiffcoreScheduler(sampler, Trailing(), ZERO, "v_prediction")
    network, noise = unet(), Noise(torch.arange(2), (3, 8, 8))
    denoiser = from_diffusers(network, scheduler)
    scheduler.set_timesteps(4)
    plan = scheduler.call.plan
    for begin in range(len(plan.states)):
        x, knots = torch.randn(2, 3, 8, 8, generator=seed(begin)), plan.knots(begin)
        expected = x
        if not plan.starts_step(begin):
            expected, knots = denoiser(x, knots[0]).at(knots[1]), knots[1:]
        if len(knots) > 1:
            expected, _ = integrate(denoiser, sampler, expected, knots, noise)
        assert scaled(begun(scheduler, network, begin, x, announced=True), expected) < 1e-5
        if plan.starts_step(begin):  # given t alone, a call starts at the start of a step
            assert scaled(begun(scheduler, network, begin, x, announced=False), expected) < 1e-5


def test_noise_is_exact_in_any_dtype():
    """C5: α and σ come from λ in float64, also where bf16 holds no difference of ᾱ from 1."""
    scheduler, t = DiffcoreScheduler(schedule=SD), torch.tensor([0, 5, 500, 999])
    x0, eps = torch.randn(2, 4, 3, 8, 8)
    level = SD.level((t.double() + 1).view(-1, 1, 1, 1) / 1000)
    exact, velocity = level.alpha * x0 + level.sigma * eps, level.alpha * eps - level.sigma * x0
    torch.testing.assert_close(scheduler.add_noise(x0, eps, t), exact.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        scheduler.get_velocity(x0, eps, t), velocity.float(), rtol=1e-6, atol=1e-6
    )
    half = scheduler.add_noise(torch.zeros_like(x0).bfloat16(), eps.bfloat16(), t)
    torch.testing.assert_close(half, (level.sigma * eps.bfloat16()).bfloat16(), rtol=0.01, atol=0)
    ddpm = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    torch.testing.assert_close(
        scheduler.add_noise(x0, eps, t), ddpm.add_noise(x0, eps, t), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        scheduler.get_velocity(x0, eps, t), ddpm.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-4
    )
    assert len(scheduler) == 1000


def test_a_flow_is_noised_along_a_straight_line():
    scheduler = DiffcoreScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    )
    x0, eps = torch.randn(2, 2, 4, 8, 8)
    mixed = scheduler.scale_noise(x0, torch.tensor([250.0, 1000.0]), eps)
    torch.testing.assert_close(
        mixed, torch.stack([0.75 * x0[0] + 0.25 * eps[0], eps[1]]), rtol=1e-5, atol=1e-5
    )


def test_generators_one_a_row_make_a_row_its_own():
    network, scheduler = unet(), DiffcoreScheduler(EulerAncestral())

    @torch.no_grad()
    def sampled(seeds, generator):
        x = torch.cat([torch.randn(1, 3, 8, 8, generator=seed(i)) for i in seeds])
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            output = torch.cat([network(row[None], t[None], return_dict=False)[0] for row in x])
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        return x

    second = sampled([1, 2], [seed(1), seed(2)])[1:]
    assert torch.equal(second, sampled([2], [seed(2)]))
    assert torch.equal(second, sampled([2], seed(2)))
    assert not torch.equal(second, sampled([2], seed(3)))


def test_step_answers_a_tuple_or_an_output_in_the_dtype_of_the_sample():
    scheduler, x = DiffcoreScheduler(), torch.randn(2, 3, 8, 8).half()

    def step(output, **options):
        scheduler.set_timesteps(2)
        return scheduler.step(output, scheduler.timesteps[0], x, **options)

    answer, (prev, x0) = step(x / 2), step(x / 2, return_dict=False)
    assert torch.equal(answer.prev_sample, prev)
    assert torch.equal(answer.pred_original_sample, x0)
    assert prev.dtype == x0.dtype == torch.float16
    level = scheduler.settings.schedule.level(1.0)
    torch.testing.assert_close(
        x0.float(), x.float() * (1 - level.sigma / 2) / level.alpha, rtol=1e-3, atol=1e-3
    )
    with_variance = torch.cat([x / 2, torch.full_like(x, math.nan)], 1)
    assert torch.equal(step(with_variance).prev_sample, prev)


def test_times_and_sigmas_may_be_given():
    scheduler = DiffcoreScheduler(schedule=SD)
    scheduler.set_timesteps(timesteps=[999, 500, 20])
    assert scheduler.timesteps.tolist() == [999, 500, 20]
    assert scheduler.timesteps.dtype == torch.int64
    assert [knot.t for knot in knots_of(scheduler)] == pytest.approx([1.0, 0.501, 0.021, 0.0])
    scheduler.set_timesteps(sigmas=[10.0, 2.0, 0.1, 0.0])
    assert [knot.ratio for knot in knots_of(scheduler)] == pytest.approx([10.0, 2.0, 0.1, 0.0])
    assert scheduler.timesteps.dtype == torch.float32
    scheduler.set_timesteps(sigmas=[14.615, 0.1])  # as printed; the table ends at 14.6146
    assert scheduler.timesteps[0] == 999


def test_a_flow_is_given_times_before_its_shift_and_its_pipelines_default_is_our_grid():
    shifted = DiffcoreScheduler(DDIM(), Trailing(), Shifted(Flow(), -2 * math.log(3)), *FLOW[1:])
    shifted.set_timesteps(sigmas=[1.0, 0.5])
    assert shifted.timesteps.tolist() == pytest.approx([1000, 750])
    ours = DiffcoreScheduler(DDIM(), UniformLogSNR(-8.0, 8.0), *FLOW)
    ours.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert [knot.logsnr for knot in knots_of(ours)] == pytest.approx(
        [-8, -8 / 3, 8 / 3, 8, math.inf]
    )


def test_it_is_saved_and_loaded_with_its_pipeline(tmp_path):
    pipe = quiet(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()))
    sampler, grid = AlphaBlending(2, eta=0.3), Karras(0.01, 50.0)
    pipe.scheduler = DiffcoreScheduler.from_config(
        pipe.scheduler.config, sampler=sampler, grid=grid
    )
    before = pipe(1, seed(), 3, output_type="np").images
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [
        "diffcore.integrations.diffusers.scheduler.scheduler",
        "DiffcoreScheduler",
    ]
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert again.scheduler.settings == pipe.scheduler.settings
    align_parameters(again.unet)
    np.testing.assert_array_equal(again(1, seed(), 3, output_type="np").images, before)
    assert from_diffusers(tmp_path).process == from_diffusers(pipe).process
    other = DiffcoreScheduler.from_config(again.scheduler.config, sampler=DDIM())
    assert (other.settings.sampler, other.settings.grid, other.settings.clip) == (DDIM(), grid, 1.0)


def test_a_copy_and_another_thread_have_no_call():
    scheduler = DiffcoreScheduler()
    scheduler.set_timesteps(3)
    other = copy.deepcopy(scheduler)
    assert other.settings == scheduler.settings
    with pytest.raises(ValueError, match="set_timesteps has not been called in this thread"):
        _ = other.timesteps
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="in this thread"):
        pool.submit(lambda: scheduler.timesteps).result()
    assert len(scheduler.timesteps) == 3


def test_a_step_beyond_the_last_or_of_another_time_is_refused():
    scheduler, x = DiffcoreScheduler(), torch.zeros(1, 3, 8, 8)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="timestep is 5, expected one of those of set_timesteps"):
        scheduler.step(x, 5, x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="the call of 1 evaluations is over"):
        scheduler.step(x, scheduler.timesteps[0], x)


BAD = [
    (lambda: DiffcoreScheduler(schedule=ZERO), "pure noise .* predicts epsilon"),
    (
        lambda: DiffcoreScheduler(schedule=Cosine(), time=TimeConditioning("t")).set_timesteps(3),
        "predicts epsilon",
    ),
    (
        lambda: DiffcoreScheduler(AdaptiveRungeKutta()),
        "is adaptive, and a pipeline needs the levels",
    ),
    (
        lambda: DiffcoreScheduler(Euler(churn=2.0), Leading()).set_timesteps(3),
        "set churn_max below σ/α = 9",
    ),
    (lambda: DiffcoreScheduler().set_timesteps(), "num_inference_steps is missing"),
    (lambda: DiffcoreScheduler().set_timesteps(timesteps=[1], sigmas=[1]), "pass one of them"),
    (lambda: DiffcoreScheduler().set_timesteps(timesteps=[20, 500]), "expected strictly monotone"),
    (lambda: DiffcoreScheduler().set_timesteps(0), "expected at least 1"),
    (lambda: DiffcoreScheduler(clip=-1.0), "clip is -1.0"),
    (lambda: DiffcoreScheduler(last=math.inf), "last is inf"),
    (
        lambda: DiffcoreScheduler(
            DDIM(), Trailing(), *FLOW, use_dynamic_shifting=True
        ).set_timesteps(3),
        "pass mu",
    ),
    (
        lambda: DiffcoreScheduler.from_config(diffusers.DDIMScheduler(thresholding=True).config),
        "thresholding is True",
    ),
    (
        lambda: DiffcoreScheduler.from_config(
            diffusers.DDIMScheduler(rescale_betas_zero_snr=True).config
        ),
        "pure noise",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_cannot_be_is_refused_before_the_first_step(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_churn_below_the_first_knot_works():
    network, x = unet(), torch.randn(2, 3, 8, 8, generator=seed())
    scheduler = DiffcoreScheduler(Euler(churn=2.0, churn_max=5.0), Leading())
    torch.manual_seed(0)
    noisy = diffusers_loop(network, scheduler, 4, x)
    assert scheduler.timesteps[-1] > 0  # raised, index 0 would be the last
    assert not torch.equal(
        noisy, diffusers_loop(network, DiffcoreScheduler(Euler(), Leading()), 4, x)
    )


def test_restarts_are_planned_and_cannot_be_begun_in_the_middle():
    sampler, x = Restart(DDIM()), torch.zeros(1, 3, 8, 8)
    scheduler = DiffcoreScheduler(sampler)
    scheduler.set_timesteps(6)
    assert len(scheduler.timesteps) == sampler.evaluations(knots_of(scheduler)) > 6
    scheduler.set_begin_index(8)
    with pytest.raises(ValueError, match="cannot start at evaluation 8 of"):
        scheduler.step(x, scheduler.timesteps[8], x)


@torch.no_grad()
def test_x_may_be_changed_between_steps():
    network, x = unet(), torch.randn(1, 3, 8, 8, generator=seed())
    scheduler = DiffcoreScheduler()
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps
    y = scheduler.step(network(x, first, return_dict=False)[0], first, x).prev_sample + 1
    done = scheduler.step(network(y, second, return_dict=False)[0], second, y).prev_sample
    level = scheduler.settings.schedule.level(0.5)
    expected = (y - level.sigma * network(y, second, return_dict=False)[0]) / level.alpha
    torch.testing.assert_close(done, expected)
