"""Networks of diffusers as denoisers: the configs' process, the schedulers' samples."""

import json
import logging
import math

import diffusers
import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import unwrap
from diffcore.core.noise import Noise
from diffcore.core.process import TimeConditioning
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline, Latents, from_diffusers
from diffcore.integrations.diffusers.loading.folder import latent_shape, parts_of
from diffcore.integrations.diffusers.scheduler.generator_noise import GeneratorNoise
from diffcore.samplers import DDIM, DDPM, Euler
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import Discrete, Flow, Karras, Leading, Linspace, Shifted, Trailing
from tests.helpers.damaged_folders import UnpicklingBomb, edit_json
from tests.helpers.tiny_pipelines import diffusers_loop, dit, unet, vae
from tests.helpers.tiny_pipelines import flux as flux_pipeline

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
C_NOISE = TimeConditioning("logsnr", -1 / 8)


@torch.no_grad()
def diffcore_loop(denoiser, sampler, knots, x, condition=None, guidance=CFG(1.0)):
    return integrate(
        denoiser, sampler, x, knots, Noise(torch.arange(len(x)), x.shape[1:]), guidance, condition
    )[0]


def start(rows=2, shape=(3, 8, 8)):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(7))


TABLES = [
    ({}, Discrete(), "epsilon"),
    ({"prediction_type": "v_prediction"}, Discrete(), "v_prediction"),
    (
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        Discrete("cosine"),
        "sample",
    ),
    ({"num_train_timesteps": 400}, Discrete(steps=400), "epsilon"),
]


@pytest.mark.parametrize(("config", "schedule", "prediction"), TABLES, ids=str)
def test_a_tables_network_gives_the_samples_of_ddim(config, schedule, prediction):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **config)
    network, x = unet(), start()
    denoiser = from_diffusers(network, scheduler)
    process = denoiser.process
    assert (process.schedule, process.prediction, process.shape) == (
        schedule,
        prediction,
        (3, 8, 8),
    )
    assert process.time == TimeConditioning("index", config.get("num_train_timesteps", 1000))
    actual = diffcore_loop(denoiser, DDIM(), Trailing().knots(schedule, 5), x)
    torch.testing.assert_close(
        actual, diffusers_loop(network, scheduler, 5, x), rtol=1e-5, atol=1e-4
    )


def test_under_a_scheduler_of_y_the_network_is_evaluated_at_x_of_the_vp_process():
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_spacing="linspace", interpolation_type="linear"
    )
    network, x = unet(), start()
    denoiser = from_diffusers(network, scheduler)
    knots = Linspace().knots(denoiser.process.schedule, 4)  # indices 999, 666, 333, 0
    actual = diffcore_loop(denoiser, DDIM(), knots, knots[0].alpha * x * scheduler.init_noise_sigma)
    torch.testing.assert_close(
        actual, diffusers_loop(network, scheduler, 4, x), rtol=1e-4, atol=1e-4
    )


def test_the_time_input_of_a_flow_network_is_T_sigma():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    network, x, blends = unet(), start(), [1.0, 0.9, 0.6, 0.2]
    denoiser = from_diffusers(network, scheduler)
    assert denoiser.process.schedule == Shifted(Flow(), -2 * math.log(3))
    assert (denoiser.process.prediction, denoiser.process.time) == (
        "flow_prediction",
        TimeConditioning("blend"),
    )
    knots = tuple(
        denoiser.process.schedule.level(t) for t in (*blends, 0.0)
    )  # theirs are shifted after they are given
    other = diffusers_loop(network, scheduler, None, x, sigmas=blends)
    torch.testing.assert_close(
        diffcore_loop(denoiser, DDIM(), knots, x), other, rtol=1e-4, atol=1e-4
    )


def test_an_edm_network_is_preconditioned():
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.6)
    network, x = unet(), start()
    denoiser = from_diffusers(network, scheduler)
    assert (denoiser.process.prediction, denoiser.process.time) == ("edm", C_NOISE)
    assert denoiser.process.sigma_data == 0.6
    knots = Karras().knots(denoiser.process.schedule, 4)
    actual = diffcore_loop(denoiser, Euler(), knots, x * scheduler.init_noise_sigma)
    torch.testing.assert_close(
        actual, diffusers_loop(network, scheduler, 4, x), rtol=1e-4, atol=1e-3
    )


def test_a_continuous_euler_network_is_evaluated_in_the_vp_scaling():
    bounds = {"sigma_min": 0.01, "sigma_max": 80.0}
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, **bounds
    )
    network, x = unet(), start()
    denoiser = from_diffusers(network, scheduler)
    assert (denoiser.process.prediction, denoiser.process.time) == ("v_prediction", C_NOISE)
    knots = Karras(**bounds).knots(denoiser.process.schedule, 4)
    other = diffusers_loop(network, scheduler, 4, x)  # its init_noise_sigma is right from now on
    actual = diffcore_loop(denoiser, DDIM(), knots, x * scheduler.init_noise_sigma * knots[0].alpha)
    torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-4)


def test_the_config_may_be_passed_in_place_of_the_scheduler():
    network, scheduler = (
        unet(),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    )
    expected = from_diffusers(network, scheduler).process
    for config in (scheduler.config, json.loads(scheduler.to_json_string())):
        assert from_diffusers(network, config).process == expected
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert from_diffusers(network, flow.config).process == from_diffusers(network, flow).process


@pytest.fixture(scope="module")
def dit_pipe():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    pipe = diffusers.DiTPipeline(transformer=dit(), vae=vae(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_dit_with_a_vae_gives_the_images_of_its_pipeline(dit_pipe):
    """CFG on classes, null label 1000, the mean half of the output, scaling_factor 0.3."""
    denoiser = from_diffusers(dit_pipe)
    process = denoiser.process
    assert (process.classes, process.dropout, process.shape, process.sigma_data) == (
        1000,
        0.1,
        (4, 8, 8),
        1.0,
    )
    assert (process.low, process.high) == (-math.inf, math.inf)
    generator = torch.Generator().manual_seed(7)
    images = dit_pipe(
        [3, 5], guidance_scale=4.0, num_inference_steps=4, generator=generator, output_type="np"
    ).images
    knots = Leading().knots(process.schedule, 4)
    z = diffcore_loop(denoiser, DDIM(), knots, start(2, (4, 8, 8)), torch.tensor([3, 5]), CFG(4.0))
    actual = (Latents(dit_pipe.vae).decode(z).detach() / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        actual.permute(0, 2, 3, 1), torch.from_numpy(images), rtol=0, atol=1e-4
    )


def test_dit_keeps_its_variance_with_which_ddpm_samples():
    """The samples are those of diffusers' DDPMScheduler with learned_range on the same network."""
    network, x, label = dit(), start(2, (4, 8, 8)), torch.tensor([3, 1000])
    config = {"clip_sample": False, "timestep_spacing": "leading"}
    scheduler = diffusers.DDPMScheduler(**config, variance_type="learned_range")
    denoiser = from_diffusers(network, diffusers.DDIMScheduler(**config))
    assert denoiser.process.variance == "learned"
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    noise = GeneratorNoise.of(2, (4, 8, 8), x.device, generators[0])
    knots = Leading().knots(Discrete(), 5)
    with torch.no_grad():
        actual = integrate(denoiser, DDPM(), x, knots, noise, condition=label)[0]
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            output = network(x, t.expand(2), class_labels=label).sample
            x = scheduler.step(output, t, x, generator=generators[1]).prev_sample
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "fields"),
    [
        (diffusers.DDPMScheduler(variance_type="learned"), {}),  # the logarithm of a variance
        (diffusers.FlowMatchEulerDiscreteScheduler(), {}),
        (diffusers.DDIMScheduler(), {"variance": "fixed"}),
    ],
    ids=["logarithm", "flow", "chosen"],
)
def test_the_variance_of_another_kind_or_that_is_not_wanted_is_left_out(scheduler, fields):
    denoiser = from_diffusers(unet(out_channels=6), scheduler, **fields)
    assert denoiser.process.variance == "fixed"
    x, level = start(), denoiser.process.schedule.level(0.5)
    assert denoiser(x, level).variance is None


def test_a_class_conditional_unet_needs_classes_and_dropout():
    network, scheduler = unet(num_class_embeds=5), diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match=r"embeds 5 labels, .* Pass classes=4 and the dropout"):
        from_diffusers(network, scheduler)
    denoiser = from_diffusers(network, scheduler, classes=4, dropout=0.1)
    arguments = {"seeds": [0, 1], "condition": [0, 3], "batch_size": 2}
    low, high = (sample(denoiser, steps=2, guidance=CFG(w), **arguments).x for w in (1.0, 3.0))
    assert not torch.equal(low, high)
    undropped = from_diffusers(network, scheduler, classes=4, dropout=0.0)
    with pytest.raises(ValueError, match="trained without condition dropout"):
        sample(undropped, steps=2, guidance=CFG(3.0), **arguments)


WRAPPERS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_network_is_loaded_as_the_network_inside(wrap):
    scheduler = diffusers.DDIMScheduler()
    plain, wrapped = (from_diffusers(network, scheduler) for network in (dit(), wrap(dit())))
    assert wrapped.process == plain.process
    assert unwrap(wrapped.network).config == plain.network.config
    with pytest.raises(ValueError, match="UNet2DConditionModel is conditioned on text"):
        from_diffusers(wrap(unet_2d_condition()), scheduler)
    with pytest.raises(ValueError, match=r"embeds 5 labels, .* Pass classes=4"):
        from_diffusers(wrap(unet(num_class_embeds=5)), scheduler)
    denoiser = from_diffusers(wrap(dit()), scheduler)  # of the mean of its output
    pipe = DiffcorePipeline.of(Denoiser(wrap(unwrap(denoiser.network)), denoiser.process))
    assert type(pipe.transformer) is diffusers.DiTTransformer2DModel


def test_a_network_whose_config_is_none_is_loaded():
    network = nn.Identity()
    network.config = None
    assert from_diffusers(network, diffusers.DDIMScheduler(), shape=(2,)).process.shape == (2,)


def test_a_field_that_contradicts_the_configs_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        process = from_diffusers(
            unet(), diffusers.DDPMScheduler(), prediction="sample", sigma_data=0.7
        ).process
    assert (process.prediction, process.sigma_data) == ("sample", 0.7)
    assert [record.message for record in caplog.records] == [
        "prediction is sample, in place of epsilon of the configs"
    ]


LATENTS = {
    "scale": {},
    "shift": {"shift_factor": 0.2},
    "channels": {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 3.0, 4.0]},
}


@pytest.mark.parametrize("config", LATENTS.values(), ids=LATENTS)
def test_latents_are_scaled_and_shifted(config):
    model, image = vae(**config), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = model.encode(image).latent_dist.mode()
        mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)])).view(
            1, -1, 1, 1
        )
        std = torch.tensor(config.get("latents_std", [1.0])).view(1, -1, 1, 1)
        z = Latents(model).encode(image)
        torch.testing.assert_close(z, (raw - mean) * 0.3 / std)
        torch.testing.assert_close(
            Latents(model).decode(z), model.decode(raw).sample, rtol=1e-4, atol=1e-4
        )
        drawn = [
            Latents(model).encode(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_saved_pipeline_is_read_by_its_folder(tmp_path, dit_pipe):
    dit_pipe.save_pretrained(tmp_path)
    denoiser, other = from_diffusers(tmp_path), from_diffusers(dit_pipe)
    assert denoiser.process == other.process
    x, level = start(2, (4, 8, 8)), denoiser.process.schedule.level(0.5)
    with torch.no_grad():
        assert torch.equal(
            denoiser(x, level, torch.tensor([1, 2])).x0, other(x, level, torch.tensor([1, 2])).x0
        )


@pytest.fixture
def folder(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    return tmp_path


def pickled(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(UnpicklingBomb(), folder / "unet" / "diffusion_pytorch_model.bin")


def remote(folder):
    (folder / "unet" / "actual.py").write_text("raise SystemExit('the code was run')")
    edit_json(folder / "model_index.json", unet=["actual", "Net"])


BROKEN = [
    (
        lambda f: (f / "model_index.json").unlink(),
        "model_index.json is missing: expected the folder of a diffusers pipeline",
    ),
    (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler_config.json is missing",
    ),
    (lambda f: (f / "model_index.json").write_text("{"), "is not JSON"),
    (
        lambda f: edit_json(f / "model_index.json", unet=[None, None]),
        "expected one of unet or transformer, and a scheduler",
    ),
    (pickled, "pickled weights are not opened, convert them first"),
    (remote, "names actual.Net as unet, which is no model of diffusers or transformers. Code"),
    (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "loaders"]),
        "is no model of diffusers",
    ),
    (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", _class_name="Mine"),
        "_class_name is 'Mine'",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_a_folder_that_is_incomplete_or_holds_code_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        from_diffusers(folder)


REFUSED = [
    (
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
        "use_flow_sigmas, but prediction_type is 'epsilon'",
    ),
    (
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        "a table of betas: set use_flow_sigmas",
    ),
    (
        diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
        "prediction_type is 'v_prediction', expected 'epsilon', the only one of an EDM",
    ),
    (
        diffusers.DDPMScheduler().config | {"prediction_type": "eps"},
        "prediction_type is 'eps', expected epsilon, sample",
    ),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "give mu"),
    (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "has the time input 1 - σ"),
    (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "pure noise"),
    (diffusers.IPNDMScheduler(), "does not contain the prediction type"),
    ({"timesteps": 3}, "names no scheduler: pass the scheduler itself"),
    (None, "a network alone does not determine schedule, prediction, time"),
]


@pytest.mark.parametrize(
    ("scheduler", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED]
)
def test_a_config_that_is_contradictory_or_incomplete_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(nn.Identity(), scheduler, shape=(3, 8, 8))


def test_a_network_without_a_config_needs_a_shape():
    with pytest.raises(ValueError, match="pass shape"):
        from_diffusers(nn.Identity(), diffusers.DDPMScheduler())
    assert from_diffusers(nn.Identity(), diffusers.DDPMScheduler(), shape=(2,)).process.shape == (
        2,
    )
    with pytest.raises(
        ValueError, match="is conditioned on text, which a network alone cannot encode"
    ):
        from_diffusers(unet_2d_condition(), diffusers.DDPMScheduler())


def unet_2d_condition():
    blocks = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
    }
    return diffusers.UNet2DConditionModel(
        sample_size=8, norm_num_groups=4, cross_attention_dim=8, **blocks
    )


def test_a_size_that_the_networks_patch_does_not_divide_is_refused():
    flux = flux_pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    parts = parts_of(flux)  # 2 pixels for one of a latent, of which 2 x 2 are a token
    assert latent_shape(parts, 20, 16) == (4, 10, 8)
    with pytest.raises(ValueError, match=r"18 and 16, expected multiples of 4, .* patch, 2"):
        latent_shape(parts, 18, 16)
