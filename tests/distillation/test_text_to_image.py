"""Students of a tiny text-to-image pipeline: diffusers alone samples them as diffcore does."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from diffcore.cli.main import main
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.integrations.diffusers import PromptNetwork
from diffcore.run import Run
from diffcore.samplers import Consistency
from diffcore.sampling.generation import sample
from diffcore.schedules import Trailing
from diffcore.training.data.latents import LatentDataset
from tests.conftest import forget_accelerate
from tests.helpers.captioned_images import DISTINCT_CAPTIONS, write_images, write_pipeline
from tests.helpers.tiny_pipelines import quiet

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = (
    "--training-steps=2",
    "--batch-size=4",
    "--save-every=2",
    "--log-every=1",
    "--trackers=[]",
    "--lr.peak=1e-2",
    "--lr.warmup=0",
)
STEPS, LABEL, SEED = 4, 1, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    write_pipeline(folder / "pipeline")
    write_images(folder / "images")
    return folder


def distil(*options):
    """The exit status of `diffcore distil pipeline`, in this process."""
    forget_accelerate()
    return main(["distil", "pipeline", "--data=images", *SHORT, *options])


def own_sample(run, **conditions):
    """Latents of the averaged student by diffcore's sampler."""
    denoiser = Run(run).denoiser()
    prompts = LatentDataset("images", "pipeline").prompts()
    network = PromptNetwork(denoiser.network, prompts)
    return sample(
        Denoiser(network, denoiser.process),
        Consistency(),
        Trailing(),
        STEPS,
        seeds=[SEED],
        condition={"label": [LABEL], **conditions} if conditions else [LABEL],
        batch_size=1,
    ).x


def diffusers_sample(pipe, monkeypatch, guidance_scale=1.0):
    """Latents by the pipeline of diffusers, whose noise is that of `own_sample`."""
    noise = Noise(torch.tensor([SEED]), (4, 8, 8))
    steps = iter(range(STEPS))
    module = diffusers.schedulers.scheduling_lcm
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise.step(next(steps)))
    return quiet(pipe)(
        DISTINCT_CAPTIONS[LABEL],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=noise.start(),
        output_type="latent",
    ).images


METHODS = {
    "Consistency": ("--method=Consistency", "--lora=2"),
    "DistributionMatching": (
        "--method=DistributionMatching",
        "--objective.fake.updates=1",
        "--training-steps=1",
    ),
}


WITH_SLOW = ["Consistency", pytest.param("DistributionMatching", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", WITH_SLOW)
def test_a_student_of_a_pipeline_is_sampled_by_diffusers_alone_as_by_us(place, monkeypatch, method):
    """The adapter of LCM-LoRA on the pipeline, and the whole pipeline of DMD2."""
    monkeypatch.chdir(place)
    run = Path(f"runs/{method}")
    assert distil(*METHODS[method], f"--folder={run}", f"--steps={STEPS}") == 0
    own = own_sample(run)
    if method == "Consistency":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained("pipeline")
        before = diffusers_sample(with_lcm(pipe, run), monkeypatch)
        assert (before - own).abs().max() > 1e-3  # the adapter changes the samples
        pipe.load_lora_weights(str(run))
    else:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
    torch.testing.assert_close(diffusers_sample(pipe, monkeypatch), own, rtol=1e-4, atol=1e-4)


def with_lcm(pipe, run):
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(run / "scheduler")
    return pipe


@pytest.mark.parametrize("method", WITH_SLOW)
def test_a_student_is_sampled_by_the_command_with_its_own_defaults(
    place, monkeypatch, capsys, method
):
    monkeypatch.chdir(place)
    run = Path(f"runs/{method}")
    if not run.exists():
        assert distil(*METHODS[method], f"--folder={run}", f"--steps={STEPS}") == 0
    config = json.loads(next(run.rglob("scheduler_config.json")).read_text())
    assert config["_class_name"] == "LCMScheduler"
    assert config["original_inference_steps"] == config["num_train_timesteps"] == 1000
    capsys.readouterr()
    folder = run if method == "Consistency" else run / "pipeline"
    words = ["sample", str(folder), "--prompt=a dog", "--out=x.npy", "--threads=1"]
    assert main(words) == 0
    assert "1 samples of 4 network evaluations each" in capsys.readouterr().out


GUIDED = ("--method=Consistency", "--guidance-range=1,9", f"--steps={STEPS}", "--folder=runs/w")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls",
    [
        diffusers.LatentConsistencyModelPipeline,
        diffusers.StableDiffusionPipeline,
    ],
)
def test_diffusers_samples_a_student_at_every_scale_of_guidance_as_we_do(place, monkeypatch, cls):
    """The scale is an input of the network, `timestep_cond` of diffusers' latent consistency."""
    monkeypatch.chdir(place)
    if not Path("runs/w").exists():
        assert distil(*GUIDED) == 0
    pipe = cls.from_pretrained("runs/w/pipeline")
    assert isinstance(pipe.scheduler, diffusers.LCMScheduler)
    assert pipe.unet.config.time_cond_proj_dim == 256
    own = {w: own_sample("runs/w", guidance_scale=[w]) for w in (2.0, 7.0)}
    assert (own[2.0] - own[7.0]).abs().max() > 1e-2
    for w, expected in own.items():
        found = diffusers_sample(pipe, monkeypatch, guidance_scale=w)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_command_samples_a_student_at_a_scale_of_guidance(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if not Path("runs/w").exists():
        assert distil(*GUIDED) == 0
    shared = ("--prompt=a dog", "--threads=1", "--sampler=Consistency", "--steps=4")
    found = {}
    for name, words in {
        "run": ("runs/w", "--condition.guidance_scale=3"),
        "pipeline": ("runs/w/pipeline", "--condition.guidance_scale=3"),
        "default": ("runs/w/pipeline",),
    }.items():
        assert main(["sample", *words, *shared, f"--out={name}.npy"]) == 0, capsys.readouterr().err
        found[name] = np.load(f"{name}.npy")
    np.testing.assert_allclose(found["run"], found["pipeline"], atol=1e-5)
    assert np.abs(found["default"] - found["pipeline"]).max() > 1e-3


@pytest.mark.slow
def test_an_adapter_has_no_input_for_the_scale_of_guidance(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert distil(*GUIDED[:2], "--lora=2", "--folder=runs/none") == 1
    assert "an adapter is trained, whose file does not hold it" in capsys.readouterr().err


def test_methods_without_a_student_of_a_pipeline_are_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for method in ("Reflow", "MeanFlow"):
        assert distil(f"--method={method}", "--folder=runs/none") == 1
        assert "use Consistency or DistributionMatching" in capsys.readouterr().err
