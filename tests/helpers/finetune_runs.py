"""Commands that fine-tune a tiny text-to-image pipeline, and samples of the runs."""

from pathlib import Path

import torch
from torch import Tensor

from diffcore.cli.main import main
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import PromptNetwork
from diffcore.run import Run
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Trailing
from diffcore.training.data.latents import LatentDataset
from tests.conftest import forget_accelerate
from tests.helpers.captioned_images import write_images, write_pipeline
from tests.helpers.tiny_pipelines import quiet

STEPS, STEPS_PER_CHECKPOINT = 4, 2
SHORT = (
    f"--steps={STEPS}",
    "--batch-size=4",
    f"--save-every={STEPS_PER_CHECKPOINT}",
    "--log-every=1",
    "--trackers=[]",
    "--lr.peak=1e-2",
    "--lr.warmup=0",
)
OPTIONS = {
    "full": ("--sample-every=2", "--sample-steps=2"),
    "lora": ("--network.lora.rank=2", "--network.lora.alpha=6"),
}
"""Options of the run that trains all weights, and of the run that trains an adapter."""


def finetune_command(folder, *options):
    """Arguments that fine-tune `pipeline` on `images` in the current folder.

    Args:
        folder: directory that the run is written to.
        options: further command-line options.

    Returns:
        The arguments of `diffcore`.
    """
    inputs = ("--pipeline=pipeline", "--data.folder=images", f"--folder={folder}")
    return ["train", "finetune-text-to-image", *inputs, *SHORT, *options]


def run_command(*arguments):
    """The exit status of a `diffcore` command that runs in this process."""
    forget_accelerate()
    return main(list(arguments))


def write_finetune_runs():
    """Write `pipeline`, `images`, their `cache` and the runs of `OPTIONS` to the current folder."""
    write_pipeline(Path("pipeline"))
    write_images(Path("images"))
    for name, options in OPTIONS.items():
        assert run_command(*finetune_command(f"runs/{name}", *options)) == 0


def diffcore_sample(run: Path, label: int) -> tuple[Tensor, Tensor]:
    """A sample of a run's averaged network at a caption: the latents, and the noise it starts from.

    Args:
        run: folder of the run.
        label: index of the caption.

    Returns:
        Latents and noise, both (1, 4, 8, 8).
    """
    denoiser = Run(run).denoiser()
    prompts = LatentDataset("images", "pipeline").prompts()
    conditional = Denoiser(PromptNetwork(denoiser.network, prompts), denoiser.process)
    samples = sample(
        conditional, DDIM(), Trailing(), STEPS, seeds=[5], condition=[label], guidance=CFG(3.0)
    )
    noise = Noise(torch.tensor([5]), (4, 8, 8)).first_sample(samples.knots[0], 1.0)
    return samples.x, noise


def diffusers_sample(pipe, prompt: str, noise: Tensor) -> Tensor:
    """Latents that a diffusers pipeline samples with the settings of `diffcore_sample`.

    Args:
        pipe: text-to-image pipeline of diffusers.
        prompt: the caption.
        noise: (1, 4, 8, 8), first sample.

    Returns:
        Latents (1, 4, 8, 8).
    """
    return quiet(pipe)(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).images
