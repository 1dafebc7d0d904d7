"""`diffcore sample` on the folder of a diffusers pipeline: prompts, labels and decoded latents."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.guidance import APG, CFG
from diffcore.integrations.diffusers import (
    DiffcorePipeline,
    DiffcoreScheduler,
    Latents,
    from_diffusers,
)
from diffcore.io.safetensors import read_weights
from diffcore.samplers import DDIM, DPMSolverPP, Heun
from diffcore.sampling.generation import sample
from diffcore.schedules import Linspace, Trailing, Within
from tests.helpers import text_networks
from tests.helpers.tiny_pipelines import dit_pipeline, quiet, stable_diffusion, unet, vae

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ("--steps=3", "--batch-size=4")
QUICK = (*ROWS, "--sampler=DDIM", "--grid=Trailing")
TEXTS = ["a red cat", "two: [dogs]"]


def scheduler(**config):
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **config)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """{name: (pipeline, folder)}; read only."""
    made = {
        "sd": text_networks.sd(scheduler()),
        "dit": dit_pipeline(scheduler()),
        "bare": stable_diffusion(scheduler()),
        "ddpm": quiet(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(clip_sample=False))),
    }
    folders = {name: tmp_path_factory.mktemp("pipelines") / name for name in made}
    for name, pipe in made.items():
        pipe.save_pretrained(folders[name])
    return {name: (pipe, folders[name]) for name, pipe in made.items()}


def expected(pipe, seeds, condition, guidance, image=None, grid=Trailing(), **options):
    z = sample(
        from_diffusers(pipe, **options),
        DDIM(),
        grid,
        3,
        seeds=seeds,
        condition=condition,
        guidance=guidance,
        batch_size=4,
        image=image,
    ).x
    return (
        z
        if getattr(pipe, "vae", None) is None
        else torch.cat([Latents(pipe.vae).decode(row[None]).detach() for row in z])
    )


def test_prompts_are_sampled_as_labels_are(diffcore, pipelines):
    pipe, folder = pipelines["sd"]
    prompts = (
        "--prompt",
        TEXTS[0],
        f"--prompt={TEXTS[1]}",
        "--negative=ugly: very",
        "--per-label=2",
        "--out=x.safetensors",
    )
    ended = diffcore("sample", folder, *QUICK, *prompts)
    assert ended.status == 0, ended.err
    assert "4 samples of 6 network evaluations each" in ended.out
    assert "CFG(scale=7.5" in ended.out  # the pipeline's own
    made = read_weights(Path("x.safetensors"))
    assert made["label"].tolist() == [0, 0, 1, 1]
    other = expected(
        pipe, [0, 1, 2, 3], [0, 0, 1, 1], CFG(7.5), prompts=TEXTS, negative="ugly: very"
    )
    torch.testing.assert_close(made["x"], other, rtol=0, atol=1e-5)
    ended = diffcore(
        "sample",
        folder,
        *QUICK,
        "--prompt",
        TEXTS[1],
        "--negative=ugly: very",
        "--seeds=3",
        "--out=y.safetensors",
    )
    torch.testing.assert_close(
        read_weights(Path("y.safetensors"))["x"], other[3:], rtol=0, atol=1e-5
    )


def test_pictures_are_named_by_prompt(diffcore, pipelines):
    _, folder = pipelines["sd"]
    prompts = ("--prompt", "a " + "very " * 20 + "long cat", "--prompt=🐱")  # beyond U+FFFF
    ended = diffcore("sample", folder, *QUICK, *prompts, "--guidance.scale=1", "--out=pictures")
    assert "2 samples of 3 network evaluations each" in ended.out
    assert sorted(path.name for path in Path("pictures").glob("*.png")) == [
        "prompt-0-seed-0.png",
        "prompt-1-seed-1.png",
    ]
    ended = diffcore("sample", folder, *QUICK, *prompts, "--out=grid.png")
    assert ended.status == 0, ended.err
    with Image.open("grid.png") as grid:
        assert 100 < grid.size[0] < 600  # beside the picture, the prompt up to its fortieth letter
        assert grid.size[1] == 2 * (2 * 16 + 4) + 4


def test_the_image_size_is_given_in_pixels(diffcore, pipelines):
    pipe, folder = pipelines["sd"]
    ended = diffcore("sample", folder, *QUICK, "--prompt=a", "--height=24", "--out=x.safetensors")
    assert ended.status == 0, ended.err
    made = read_weights(Path("x.safetensors"))["x"]
    assert made.shape == (1, 3, 24, 16)
    other = expected(pipe, [0], [0], CFG(7.5), prompts=["a"], shape=(4, 12, 8))
    torch.testing.assert_close(made, other, rtol=0, atol=1e-5)


def test_labels_of_a_dit_are_sampled_and_decoded(diffcore, pipelines):
    pipe, folder = pipelines["dit"]
    ended = diffcore("sample", folder, *QUICK, "--labels=3,5", "--out=x.safetensors")
    assert ended.status == 0, ended.err
    assert "CFG(scale=4.0" in ended.out
    made = read_weights(Path("x.safetensors"))["x"]
    torch.testing.assert_close(made, expected(pipe, [0, 1], [3, 5], CFG(4.0)), rtol=0, atol=1e-5)


def test_an_unconditional_pipeline_is_sampled(diffcore, pipelines):
    pipe, folder = pipelines["ddpm"]
    ended = diffcore("sample", folder, *QUICK, "--per-label=3", "--out=x.safetensors")
    assert ended.status == 0, ended.err
    made = read_weights(Path("x.safetensors"))["x"]
    torch.testing.assert_close(made, expected(pipe, [0, 1, 2], None, CFG(1.0)), rtol=0, atol=1e-5)


def test_an_image_is_encoded_before_it_is_noised(diffcore, pipelines):
    pipe, folder = pipelines["sd"]
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save("start.png")
    ended = diffcore(
        "sample",
        folder,
        *QUICK,
        "--prompt=a",
        "--image=start.png",
        "--start=0.5",
        "--out=x.safetensors",
    )
    assert ended.status == 0, ended.err
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        z = Latents(pipe.vae).encode(image)
    grid = Within(Trailing(), low=2 * torch.tensor(2.0).log().item())
    other = expected(pipe, [0], [0], CFG(7.5), z, grid, prompts=["a"])
    torch.testing.assert_close(read_weights(Path("x.safetensors"))["x"], other, rtol=0, atol=1e-4)


def test_a_diffcore_scheduler_gives_its_sampler_and_grid(diffcore, tmp_path):
    ours = DiffcoreScheduler.from_config(
        scheduler().config, sampler=DPMSolverPP("2M"), grid=Linspace()
    )
    quiet(diffusers.DDPMPipeline(unet(), ours)).save_pretrained(tmp_path / "pipe")
    assert (
        "(DPMSolverPP(variant='2M'"
        in (ended := diffcore("sample", tmp_path / "pipe", *ROWS, "--out=x.png")).out
    )
    assert "Linspace(" in ended.out
    assert (
        "(DDIM("
        in diffcore("sample", tmp_path / "pipe", *ROWS, "--out=x.png", "--sampler=DDIM").out
    )


@pytest.mark.parametrize("rule", [CFG(3.0), APG(2.0)])
def test_a_diffcore_pipeline_gives_the_samples_of_its_own_call(diffcore, tmp_path, rule):
    process = Process(shape=(3, 8, 8), low=0.0, classes=4, dropout=0.2)
    ours = quiet(
        DiffcorePipeline.of(
            Denoiser(unet(num_class_embeds=5), process), Heun(), Linspace(0.02), 4, rule
        )
    )
    ours.save_pretrained(tmp_path / "pipeline")
    assert from_diffusers(tmp_path / "pipeline").process == from_diffusers(ours).process == process
    ended = diffcore(
        "sample", tmp_path / "pipeline", "--labels=1,3", "--batch-size=2", "--out=x.safetensors"
    )
    assert f"({Heun()}, {Linspace(0.02)}, 4 steps, {rule})" in ended.out, ended.err
    other = ours(class_labels=[1, 3], seeds=[0, 1], output_type="latent").images
    torch.testing.assert_close(read_weights(Path("x.safetensors"))["x"], other)


def test_prompts_are_read_from_a_file(diffcore, pipelines):
    _, folder = pipelines["sd"]
    Path("settings.yaml").write_text(
        "steps: 2\nsampler: DDIM\nprompt: [a cat, 'b: c']\nout: pictures\n"
    )
    assert (
        "2 samples of 4 network evaluations each"
        in diffcore("sample", folder, "--config=settings.yaml").out
    )


REFUSED = {
    "no encoder": (
        "bare",
        "--prompt=a",
        "this StableDiffusionPipeline has no text_encoder and no tokenizer: load it",
    ),
    "no text": (
        "ddpm",
        "--prompt=a",
        "UNet2DModel is not conditioned on text: leave prompts and negative out",
    ),
    "labels and prompts": (
        "sd",
        "--prompt=a --labels=1",
        "labels and prompts were given, expected one of them",
    ),
    "seeds": ("sd", "--prompt=a --prompt=b --seeds=1", "seeds are 1, expected 2: 2 prompts x 1"),
    "unconditional": (
        "dit",
        "",
        "needs a condition to strengthen: pass one label for each sample (--labels, --prompt)",
    ),
    "odd size": (
        "sd",
        "--prompt=a --width=17",
        "height and width are 16 and 17, expected multiples of 2, the factor of the VAE",
    ),
    "negative size": ("sd", "--prompt=a --width=-2", "height and width are 16 and -2, expected"),
    "label": ("dit", "--labels=1000", "labels [1000] are out of range"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_a_pipeline_lacks_are_refused_in_one_line(diffcore, pipelines, case):
    name, options, message = REFUSED[case]
    ended = diffcore("sample", pipelines[name][1], *QUICK, *options.split(), "--out=x.png")
    assert ended.status == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not Path("x.png").exists()


def test_a_run_that_is_conditioned_on_labels_refuses_prompts(diffcore, trained, tmp_path):
    ended = diffcore("sample", trained, *QUICK, "--prompt=a")
    assert ended.status == 1
    assert "UNet2DModel is not conditioned on text: leave prompts and negative out" in ended.err
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("pipeline"))
    ended = diffcore("sample", tmp_path / "run", *QUICK, "--prompt=a", "--height=8")
    assert ended.status == 1
    assert (
        "pipeline is missing, without which a run has no --prompt and no --height: leave them out"
        in ended.err
    )


def test_the_pipeline_of_a_run_gives_another_image_size(diffcore, trained):
    ended = diffcore("sample", trained, *QUICK, "--labels=1", "--height=16", "--out=x.safetensors")
    assert ended.status == 0, ended.err
    assert read_weights(Path("x.safetensors"))["x"].shape == (1, 1, 16, 8)


@pytest.mark.parametrize("text", [True, False])
def test_the_pipeline_of_a_run_decodes_its_latents(diffcore, tmp_path, pipelines, text):
    network = unet(in_channels=4, out_channels=4)
    pipe = (
        pipelines["sd"][0]
        if text
        else DiffcorePipeline.of(Denoiser(network, Process(shape=(4, 8, 8))), vae=vae())
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    Process(shape=(4, 8, 8)).save(tmp_path / "process.json")
    (tmp_path / "config.yaml").write_text(
        "network: {class_path: torch.nn.Identity}\nsample_steps: 2\nsampler: DDIM\n"
    )
    options, named = (("--prompt=a",), {"prompts": ["a"]}) if text else ((), {})
    ended = diffcore(
        "sample",
        tmp_path,
        *options,
        "--grid=Trailing",
        "--batch-size=4",
        "--steps=3",
        "--out=x.safetensors",
    )
    assert ended.status == 0, ended.err
    made = read_weights(Path("x.safetensors"))["x"]
    assert made.shape == (1, 3, 16, 16)
    torch.testing.assert_close(
        made, expected(pipe, [0], [0] if text else None, CFG(1.0), **named), rtol=0, atol=1e-5
    )
