"""Text-conditioned networks as denoisers: prompts are labels, and latents are the pipeline's."""

import math

import diffusers
import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.editing.inversion import invert
from diffcore.guidance import APG, CFG
from diffcore.integrations.diffusers import (
    DiffcoreScheduler,
    PromptNetwork,
    Prompts,
    encode_prompts,
    from_diffusers,
)
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import Flow, Trailing
from tests.helpers import text_networks
from tests.helpers.text_networks import ddim, flow
from tests.helpers.tiny_pipelines import unet, unet_2d_condition

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TEXTS = ("a red cat", "two dogs")
SHAPE = (4, 8, 8)


def start(shape=SHAPE):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def diffcore_loop(denoiser, x, scale, labels=(0, 1), knots=None):
    knots = knots or Trailing().knots(denoiser.process.schedule, 4)
    noise = Noise(torch.arange(len(x)), x.shape[1:])
    return integrate(denoiser, DDIM(), x, knots, noise, CFG(scale), torch.tensor(labels))[0]


def assert_near(actual, other):
    assert float((actual - other).abs().max() / other.abs().max()) < 1e-5


FAMILIES = {
    "StableDiffusion": (text_networks.sd, ddim(), {}),
    "StableDiffusion 2": (
        text_networks.sd,
        ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        {},
    ),
    "XL": (text_networks.sdxl, ddim(), {}),
    "3": (text_networks.sd3, flow(shift=3.0), {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    "PixArt": (text_networks.pixart, ddim(), {"use_resolution_binning": False}),
    "Sana": (
        text_networks.sana,
        flow(shift=3.0),
        {
            "use_resolution_binning": False,
            "sigmas": [1.0, 0.75, 0.5, 0.25],
            "height": 256,
            "width": 256,
        },
    ),
}


CASES = [
    *((family, "ugly") for family in FAMILIES),
    ("StableDiffusion", ""),
    ("XL", ""),
    ("PixArt", ""),
]


@pytest.mark.parametrize(("family", "negative"), CASES)
def test_guided_latents_are_those_of_the_pipeline(family, negative):
    make, scheduler, options = FAMILIES[family]
    pipe, x = make(scheduler), start()
    denoiser = from_diffusers(pipe, prompts=TEXTS, negative=negative)
    assert (denoiser.process.classes, denoiser.process.dropout, denoiser.process.shape) == (
        2,
        0.1,
        SHAPE,
    )
    actual = diffcore_loop(denoiser, x, 5.0)
    if negative:  # XL, called without one, takes zeros
        options = options | {
            "negative_prompt": negative if family in ("PixArt", "Sana") else [negative] * 2
        }
    arguments = {
        "guidance_scale": 5.0,
        "num_inference_steps": 4,
        "latents": x.clone(),
        "output_type": "latent",
    }
    assert_near(actual, pipe(list(TEXTS), **arguments | options).images)
    swapped = diffcore_loop(denoiser, x, 5.0, (1, 0))
    assert float((swapped - actual).abs().max()) > 1e-3


@pytest.mark.parametrize("dynamic", [True, False])
def test_flux_is_packed_guided_by_its_input_and_shifted_by_its_size(dynamic):
    pipe, shape = (
        text_networks.flux(flow(use_dynamic_shifting=True) if dynamic else flow(shift=2.0)),
        (4, 8, 12),
    )
    denoiser, x = from_diffusers(pipe, prompts=TEXTS, shape=shape), start(shape)
    mu = 0.5 + (24 - 256) * 0.65 / 3840 if dynamic else math.log(2)  # of 4 x 6 tokens
    assert denoiser.process.schedule.inner == Flow()
    assert denoiser.process.schedule.shift == pytest.approx(-2 * mu)
    told_by_ours = DiffcoreScheduler.from_config(pipe.scheduler.config)
    again = from_diffusers(
        pipe.transformer, told_by_ours, prompts=denoiser.network.prompts, shape=shape
    )
    assert again.process.schedule.logsnr(0.3) == pytest.approx(
        denoiser.process.schedule.logsnr(0.3), abs=1e-12
    )
    packed = {
        "latents": pipe._pack_latents(x, 2, *shape),
        "height": 16,
        "width": 24,
        "output_type": "latent",
    }
    for scale, dropout in (
        (1.0, 0.0),
        (4.0, 0.1),  # the network is distilled: true CFG needs a dropout
    ):
        guided = from_diffusers(pipe, prompts=TEXTS, negative="ugly", shape=shape, dropout=dropout)
        true = {"negative_prompt": ["ugly"] * 2, "true_cfg_scale": scale}
        theirs = pipe(
            list(TEXTS), num_inference_steps=4, guidance_scale=3.5, **packed, **true
        ).images
        assert_near(
            diffcore_loop(guided, x, scale),
            pipe._unpack_latents(theirs, 16, 24, pipe.vae_scale_factor),
        )
    with pytest.raises(ValueError, match="trained without condition dropout"):
        diffcore_loop(denoiser, x, 4.0)


def test_a_network_that_is_not_distilled_takes_no_guidance_scale():
    pipe = text_networks.flux(flow(), guidance_embeds=False)
    assert set(encode_prompts(pipe, TEXTS).tensors) == {
        "encoder_hidden_states",
        "pooled_projections",
    }
    strong = encode_prompts(text_networks.flux(flow()), TEXTS, guidance_scale=7.0).tensors[
        "guidance"
    ]
    assert torch.equal(strong, torch.full((3,), 7.0))


def test_pixart_of_1024_pixels_is_conditioned_on_its_size():
    config = {
        "sample_size": 128,
        "attention_head_dim": 12,
        "patch_size": 16,
        "cross_attention_dim": 24,
    }
    pipe, x = text_networks.pixart(ddim(), **config), start((4, 128, 128))
    pipe.vae_scale_factor = 8
    denoiser = from_diffusers(pipe, prompts=TEXTS[:1])
    assert (
        denoiser.network.prompts.tensors["added_cond_kwargs.resolution"].tolist()
        == [[1024.0, 1024.0]] * 2
    )
    theirs = pipe(
        TEXTS[0], guidance_scale=3.0, num_inference_steps=4, latents=x[:1], output_type="latent"
    ).images
    assert_near(diffcore_loop(denoiser, x[:1], 3.0, (0,)), theirs)


@pytest.fixture(scope="module")
def pipe():
    return text_networks.sdxl(ddim())


def test_the_size_of_xl_is_in_pixels(pipe):
    bank = from_diffusers(pipe, prompts=TEXTS, shape=(4, 16, 8)).network.prompts
    assert bank.tensors["added_cond_kwargs.time_ids"].tolist() == [[32, 16, 0, 0, 32, 16]] * 3


def test_prompts_do_not_depend_on_each_other(pipe):
    both, alone = encode_prompts(pipe, TEXTS), encode_prompts(pipe, TEXTS[1:])
    assert both.texts == TEXTS
    for name, bank in both.tensors.items():
        assert torch.equal(bank[1:], alone.tensors[name])
    denoisers = [from_diffusers(pipe, prompts=texts) for texts in (TEXTS, TEXTS[:1], TEXTS[1:])]
    arguments = {"steps": 3, "guidance": APG(4.0), "batch_size": 4}
    samples = sample(denoisers[0], seeds=[0, 1, 2, 3], condition=[0, 1, 0, 1], **arguments).x
    for label, denoiser in enumerate(denoisers[1:]):
        own = sample(denoiser, seeds=[label, label + 2], condition=[0, 0], **arguments).x
        assert torch.equal(samples[label::2], own)


def test_without_a_prompt_the_null_condition_is_used(pipe):
    some, none = (from_diffusers(pipe, prompts=texts, negative="ugly") for texts in (TEXTS, ()))
    assert (none.process.classes, none.process.dropout) == (0, 0.0)
    assert torch.equal(sample(some, steps=2, seeds=[0]).x, sample(none, steps=2, seeds=[0]).x)


def test_inversion_under_a_prompt_returns_to_the_sample(pipe):
    denoiser, x = from_diffusers(pipe, prompts=TEXTS), start()
    knots = tuple(denoiser.process.schedule.level(t) for t in (0.25, 0.2, 0.15))
    inverted = invert(denoiser, x, knots, 30, CFG(2.0), torch.tensor([0, 1])).x
    assert_near(diffcore_loop(denoiser, inverted, 2.0, (0, 1), knots), x)
    assert float((diffcore_loop(denoiser, inverted, 2.0, (1, 0), knots) - x).abs().max()) > 1e-3


def test_encoders_are_in_eval_mode_during_encoding_and_restored_after_it(pipe):
    once = encode_prompts(pipe, TEXTS)
    pipe.text_encoder.train()
    pipe.text_encoder.config.attention_dropout = 0.5
    for layer in pipe.text_encoder.modules():
        layer.dropout = 0.5
    try:
        assert torch.equal(
            encode_prompts(pipe, TEXTS).tensors["encoder_hidden_states"],
            once.tensors["encoder_hidden_states"],
        )
        assert pipe.text_encoder.training
    finally:
        pipe.text_encoder.eval()


def bank():
    return Prompts(
        {"states": torch.arange(6.0).view(3, 2), "added.mask": torch.tensor([[1], [2], [3]])},
        ("a", "b"),
    )


def test_arguments_are_the_entries_of_the_labels():
    arguments = bank().arguments(torch.tensor([2, 0, 0]), torch.float64)
    assert arguments["states"].tolist() == [[4, 5], [0, 1], [0, 1]]
    assert arguments["states"].dtype == torch.float64
    assert arguments["added"]["mask"].tolist() == [[3], [1], [1]]
    assert arguments["added"]["mask"].dtype == torch.int64


def test_a_saved_bank_is_loaded_unchanged(tmp_path):
    bank().save(tmp_path / "prompts.safetensors")
    read = Prompts.load(tmp_path / "prompts.safetensors")
    assert read.texts == ("a", "b")
    for name, value in bank().tensors.items():
        assert torch.equal(read.tensors[name], value)


def test_a_bank_moves_with_its_network_and_is_not_in_its_state():
    networks = [
        PromptNetwork(torch.nn.Linear(2, 2), bank(), follow).to(torch.float64)
        for follow in (True, False)
    ]
    assert [network.prompts.tensors["states"].dtype for network in networks] == [
        torch.float64,
        torch.float32,
    ]
    assert [network.prompts.tensors["added.mask"].dtype for network in networks] == [
        torch.int64
    ] * 2
    assert set(networks[0].state_dict()) == {"network.weight", "network.bias"}


def test_a_network_alone_accepts_encoded_prompts(pipe):
    whole = from_diffusers(pipe, prompts=TEXTS, negative="ugly")
    alone = from_diffusers(
        pipe.unet, pipe.scheduler, prompts=encode_prompts(pipe, TEXTS, "ugly"), sigma_data=1.0
    )
    x, level, labels = start(), whole.process.schedule.level(0.5), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(whole(x, level, labels).x0, alone(x, level, labels).x0)


def other_text(**config):
    return unet_2d_condition(**config), ddim()


REFUSED = {
    "too few rows": (
        lambda p: Prompts({"a": torch.zeros(2, 3)}, TEXTS),
        r"the tensors have \{'a': 2\} entries, expected 3",
    ),
    "no tensors": (lambda p: Prompts({}), "the tensors have no entries, expected 1"),
    "one string": (
        lambda p: encode_prompts(p, "a cat"),
        r"expected a list of texts, such as \['a cat'\]",
    ),
    "no encoder": (
        lambda p: encode_prompts(without(p, *CLIPS), TEXTS),
        "has no text_encoder and no text_encoder_2: load",
    ),
    "no tokenizer": (
        lambda p: encode_prompts(without(p, "tokenizer_2"), TEXTS),
        "has no tokenizer_2: load it",
    ),
    "refiner": (
        lambda p: encode_prompts(refiner(p), TEXTS),
        "is a refiner, conditioned on an aesthetic score",
    ),
    "network alone": (
        lambda p: from_diffusers(p.unet, ddim(), prompts=TEXTS),
        "which a network alone cannot encode",
    ),
    "two negatives": (
        lambda p: from_diffusers(p, prompts=encode_prompts(p, TEXTS), negative="x"),
        "beside Prompts",
    ),
    "no text": (
        lambda p: from_diffusers(unet(), ddim(), prompts=TEXTS),
        "UNet2DModel is not conditioned on text",
    ),
    "inpainting": (
        lambda p: from_diffusers(*other_text(in_channels=9)),
        "has 9 input and 4 output channels",
    ),
    "images": (
        lambda p: from_diffusers(*other_text(addition_embed_type="image", encoder_hid_dim=4)),
        "addition_embed_type",
    ),
    "a flow's": (
        lambda p: from_diffusers(text_networks.flux(ddim()), prompts=TEXTS),
        "predicts flow_prediction, but the config",
    ),
}


CLIPS = ("text_encoder", "text_encoder_2")


def without(pipe, *names):
    return diffusers.StableDiffusionXLPipeline(**pipe.components | dict.fromkeys(names))


def refiner(pipe):
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **pipe.components, requires_aesthetics_score=True
    )


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_conditions_are_refused(pipe, case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        call(pipe)
    assert "\n" not in str(caught.value)
