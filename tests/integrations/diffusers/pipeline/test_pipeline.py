"""DiffcorePipeline: the samples of our own loop, in a pipeline that is saved, loaded and called as
those of diffusers.
"""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.guidance import APG, CFG, Interval
from diffcore.integrations.diffusers import (
    DiffcorePipeline,
    DiffcoreScheduler,
    Latents,
    from_diffusers,
)
from diffcore.samplers import DDIM, DDPM, AdaptiveRungeKutta, DPMSolverPP, Heun
from diffcore.sampling import images
from diffcore.sampling.generation import DEFAULT_GRID, sample
from diffcore.schedules import Cosine, Discrete, Karras, Trailing, UniformLogSNR
from tests.helpers.tiny_pipelines import PLAIN, PROCESS, dit, quiet, unet, vae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet(DiffcorePipeline.from_pretrained(folder))


def test_a_loaded_pipeline_is_what_was_saved(pipe, denoiser):
    assert pipe.process == PROCESS
    settings = pipe.scheduler.settings
    assert (settings.sampler, settings.grid, pipe.guidance) == (Heun(), Trailing(), CFG(2.0))
    assert pipe.config.num_inference_steps == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.unet.parameters(), denoiser.network.parameters(), strict=True)
    )


CALLS = {
    "its own": ({}, (Heun(), Trailing(), 3, CFG(2.0))),
    "others": (
        {
            "sampler": DPMSolverPP("2M"),
            "grid": UniformLogSNR(),
            "num_inference_steps": 4,
            "guidance": APG(3.0),
        },
        (DPMSolverPP("2M"), UniformLogSNR(), 4, APG(3.0)),
    ),
    "bounds become knots": (
        {"guidance": Interval(CFG(3.0), sigma=(0.3, 3.0))},
        (Heun(), Trailing(), 3, Interval(CFG(3.0), sigma=(0.3, 3.0))),
    ),
    "stochastic": ({"sampler": DDPM()}, (DDPM(), Trailing(), 3, CFG(2.0))),
}


@pytest.mark.parametrize(("options", "expected"), CALLS.values(), ids=CALLS)
def test_with_seeds_it_gives_bitwise_the_samples_of_sample(pipe, denoiser, options, expected):
    seeds, labels = [3, -5, 2**60], [0, 3, 1]
    made = pipe(class_labels=labels, seeds=seeds, output_type="latent", **options).images
    *ways, guidance = expected
    ours = sample(denoiser, *ways, seeds=seeds, condition=labels, guidance=guidance, batch_size=3).x
    assert torch.equal(made, ours)


def test_the_denoiser_of_a_pipeline_is_sampled_as_any(pipe, denoiser):
    arguments = {"steps": 2, "seeds": [1], "condition": [2]}
    assert torch.equal(sample(pipe.denoiser, **arguments).x, sample(denoiser, **arguments).x)


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=repr)
def test_with_generators_it_draws_as_pipelines_of_diffusers_draw(sampler):
    """DDPMPipeline with our scheduler draws the first x and each step's noise from the generator;
    unit variance of data.
    """
    network, process = unet(), Process(Discrete(), "epsilon", shape=(3, 8, 8), sigma_data=1.0)
    mine = quiet(DiffcorePipeline.of(Denoiser(network, process), sampler, Trailing()))
    other = quiet(diffusers.DDPMPipeline(network, mine.scheduler))
    options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    one, two = (
        p(generator=torch.Generator().manual_seed(5), **options).images for p in (mine, other)
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_a_list_of_generators_makes_each_image_its_own(plain):
    def drawn(*seeds):
        return plain(
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            sampler=DDPM(),
            output_type="latent",
        ).images

    torch.testing.assert_close(drawn(1, 2)[1:], drawn(2), rtol=1e-5, atol=1e-5)


def test_without_a_generator_it_draws_from_torchs_own(plain):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (plain(output_type="latent").images for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(plain(output_type="latent").images, first)
    assert not torch.equal(first, second)


def test_images_come_in_every_type(plain):
    made = {
        kind: plain(seeds=[0, 1], output_type=kind).images for kind in ("latent", "pt", "np", "pil")
    }
    assert torch.equal(made["pt"], images.to_unit_range(made["latent"], PLAIN))
    assert made["np"].shape == (2, 8, 8, 3)
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    assert [picture.size for picture in made["pil"]] == [(8, 8)] * 2
    assert np.array_equal(
        np.stack([np.asarray(p) for p in made["pil"]]), images.to_pixels(made["latent"], PLAIN)
    )
    assert torch.equal(plain(seeds=[0, 1], output_type="pt", return_dict=False)[0], made["pt"])


def test_a_range_other_than_of_diffusers_is_shown_right():
    process = Process(Cosine(), shape=(3, 8, 8), low=0.0, high=4.0)
    made = quiet(DiffcorePipeline.of(Denoiser(unet(), process), num_inference_steps=2))
    x, shown = (made(seeds=[0], output_type=kind).images for kind in ("latent", "pt"))
    assert torch.equal(shown, (x / 4).clamp(0, 1))


def test_latents_are_decoded(tmp_path):
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    source = diffusers.DiTPipeline(transformer=dit(), vae=vae(), scheduler=scheduler)
    denoiser = from_diffusers(source)
    DiffcorePipeline.of(
        denoiser, num_inference_steps=2, guidance=CFG(4.0), vae=source.vae
    ).save_pretrained(tmp_path)
    pipe = quiet(DiffcorePipeline.from_pretrained(tmp_path))
    assert pipe.process == denoiser.process  # unbounded latents of 4 channels
    arguments = {"class_labels": [7, 8], "seeds": [0, 1]}
    z, shown = (pipe(**arguments, output_type=kind).images for kind in ("latent", "pt"))
    assert torch.equal(
        z,
        sample(
            denoiser, steps=2, seeds=[0, 1], condition=[7, 8], guidance=CFG(4.0), batch_size=2
        ).x,
    )
    with torch.no_grad():
        assert torch.equal(shown, (Latents(source.vae).decode(z) / 2 + 0.5).clamp(0, 1))


def test_a_callback_sees_each_step_and_may_change_x(plain):
    calls, time_input = [], Denoiser(plain.unet, PLAIN).process.time

    def halve(pipe, step, timestep, values):
        calls.append((step, timestep, values["latents"]))
        return {"latents": values["latents"] / 2}

    made = plain(seeds=[0], output_type="latent", sampler=Heun(), callback_on_step_end=halve).images
    knots = DEFAULT_GRID.knots(PLAIN.schedule, 3)
    assert [step for step, _, _ in calls] == [0, 1, 2]
    assert [calls[0][1], calls[-1][1]] == [
        time_input(knots[0]),
        time_input(knots[2]),
    ]  # its first and last step are of the first order
    assert torch.equal(made, calls[-1][2] / 2)
    assert not torch.equal(
        calls[-1][2], plain(seeds=[0], output_type="latent", sampler=Heun()).images
    )


def test_a_callback_may_end_the_run(plain):
    seen = []

    def stop(pipe, step, timestep, values):
        seen.append(values["latents"])
        pipe._interrupt = step == 1
        return values

    made = plain(seeds=[0], output_type="latent", callback_on_step_end=stop).images
    assert len(seen) == 2
    assert torch.equal(made, seen[1])
    assert len(plain(seeds=[0], output_type="latent").images) == 1  # the next call runs to its end


def test_the_bar_counts_steps(folder, capsys):
    pipe = DiffcorePipeline.from_pretrained(folder)
    capsys.readouterr()
    pipe(class_labels=0, seeds=[0])
    assert "3/3" in capsys.readouterr().err


def test_an_adaptive_sampler_is_for_a_call(plain):
    expected = sample(
        Denoiser(plain.unet, PLAIN), AdaptiveRungeKutta(), Karras(), 3, seeds=[0], batch_size=1
    ).x
    assert torch.equal(
        plain(seeds=[0], sampler=AdaptiveRungeKutta(), grid=Karras(), output_type="latent").images,
        expected,
    )
    with pytest.raises(ValueError, match="is adaptive, and a pipeline needs the levels"):
        DiffcorePipeline.of(Denoiser(unet(), PLAIN), AdaptiveRungeKutta())


def test_a_network_of_half_precision_is_evaluated_in_it_and_x_is_not(folder, pipe):
    half = quiet(DiffcorePipeline.from_pretrained(folder, dtype=torch.bfloat16))
    arguments = {"class_labels": [1, 2], "seeds": [0, 1], "output_type": "latent"}
    made, exact = half(**arguments).images, pipe(**arguments).images
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    assert not torch.equal(made, exact)
    assert torch.equal(half.to(torch.float32)(**arguments).images, half(**arguments).images)


def test_models_are_offloaded_between_their_turns():
    """To the same processor here: each model has its hook, and the device of a call is
    the hooks'.
    """
    source = diffusers.DiTPipeline(
        transformer=dit(), vae=vae(), scheduler=diffusers.DDIMScheduler(clip_sample=False)
    )
    made = quiet(DiffcorePipeline.of(from_diffusers(source), num_inference_steps=2, vae=source.vae))
    arguments = {"class_labels": [1, 2], "seeds": [0, 1], "output_type": "pt"}
    expected = made(**arguments).images
    made.enable_model_cpu_offload(device="cpu")
    assert [hook.model for hook in made._all_hooks] == [made.transformer, made.vae]
    assert made._execution_device == torch.device("cpu:0")
    assert torch.equal(made(**arguments).images, expected)


def test_threads_share_a_pipeline(pipe):
    def one(seed):
        return pipe(class_labels=seed % 4, seeds=[seed], output_type="latent").images

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(8)))
    assert all(torch.equal(made, one(seed)) for seed, made in enumerate(together))


def test_one_label_is_for_all(pipe):
    made = pipe(class_labels=2, seeds=[0, 1], output_type="latent").images
    assert torch.equal(
        made, pipe(class_labels=torch.tensor([2, 2]), seeds=[0, 1], output_type="latent").images
    )


CALLED_WRONG = [
    (
        {"seeds": [0, 1], "class_labels": [1]},
        "defines 1 by class_labels, 2 by seeds: pass as many of each",
    ),
    ({"seeds": [0], "generator": torch.Generator()}, "seeds and generator were given: pass one"),
    ({"seeds": [0]}, "needs a condition to strengthen"),
    ({"seeds": [0], "class_labels": 9}, r"labels \[9\] are out of range"),
    ({"seeds": [2**64], "class_labels": 0}, r"expected integers within \[-2\^63"),
    (
        {"class_labels": 0, "output_type": "jpg"},
        "output_type is 'jpg', expected one of pil, np, pt, latent",
    ),
    ({"class_labels": 0, "num_inference_steps": 0}, "steps"),
]


@pytest.mark.parametrize(
    ("options", "message"), CALLED_WRONG, ids=[message[:30] for _, message in CALLED_WRONG]
)
def test_what_cannot_be_sampled_is_refused_before_the_first_step(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)


def test_samples_that_are_no_images_are_returned_as_latents():
    made = DiffcorePipeline.of(
        Denoiser(unet(in_channels=2, out_channels=2), Process(Cosine(), shape=(2, 8, 8)))
    )
    with pytest.raises(
        ValueError, match="not images of 1 or 3 channels: pass output_type='latent'"
    ):
        made()
    assert quiet(made)(num_inference_steps=1, output_type="latent").images.shape == (1, 2, 8, 8)


def test_parts_that_contradict_each_other_are_refused(plain):
    scheduler = plain.scheduler
    with pytest.raises(ValueError, match="pass either unet or transformer"):
        DiffcorePipeline(scheduler)
    with pytest.raises(
        ValueError, match=r"is a DDIMScheduler, expected a DiffcoreScheduler: .*from_config"
    ):
        DiffcorePipeline(diffusers.DDIMScheduler(), unet())
    clipping = DiffcoreScheduler.from_config(diffusers.DDIMScheduler().config)
    with pytest.raises(ValueError, match=r"clips x_0 to ±1, .* clip=None"):
        DiffcorePipeline(clipping, unet(), shape=(3, 8, 8))
    with pytest.raises(ValueError, match="dropout is 2"):
        DiffcorePipeline(scheduler, unet(), shape=(3, 8, 8), classes=1, dropout=2.0)
    with pytest.raises(ValueError, match="is a Linear, and a pipeline holds ModelMixins"):
        DiffcorePipeline.of(Denoiser(nn.Linear(1, 1), PLAIN))


# Folders
