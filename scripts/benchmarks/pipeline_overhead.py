"""The cost of a StableDiffusionPipeline call with diffcore's scheduler and with that of diffusers.

Both sides have the same pipeline class, tiny network, prompts and generator, and make equal latents
to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from benchmarks.comparison import Comparison, check_pairs, processor_clock, time_pairs
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcoreScheduler, attach
from diffcore.samplers import DDIM, DPMSolverPP, Sampler

STEPS = 25
SIZE = 16
"""Height and width of the latents."""
SCALE = 7.5
TABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


class SchedulerPair(NamedTuple):
    """A scheduler of diffusers and the equal sampler of diffcore.

    Args:
        scheduler: class name of the scheduler.
        options: its options beside the table of betas.
        sampler: sampler of diffcore.
        attached: whether diffcore guides too, by `attach`.
        bound: ratio that diffcore should not exceed.
    """

    scheduler: str
    options: dict[str, Any]
    sampler: Sampler
    attached: bool = False
    bound: float = 1.0


PAIRS = {
    "DDIM": SchedulerPair(
        "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, DDIM()
    ),
    "DPM++ 2M": SchedulerPair(
        "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, DPMSolverPP("2M")
    ),
    "DDIM, our CFG attached": SchedulerPair(
        "DDIMScheduler",
        {"clip_sample": False, "timestep_spacing": "trailing"},
        DDIM(),
        attached=True,
        bound=1.02,
    ),
}


def measure_pipelines(pairs: int = 40, steps: int = STEPS) -> list[Comparison]:
    """Compare a call with CFG for each scheduler.

    Args:
        pairs: measured pairs of each comparison, at least 30.
        steps: sampler steps of a call.

    Returns:
        The comparisons.

    Raises:
        ValueError: there are too few pairs.
    """
    check_pairs(pairs)
    return [
        Comparison(f"{name}, {steps} steps", pair.bound, *_time_calls(pair, steps, pairs))
        for name, pair in PAIRS.items()
    ]


def _time_calls(
    pair: SchedulerPair, steps: int, pairs: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Processor seconds of both calls in each pair."""
    return time_pairs(*create_calls(pair, steps), pairs, clock=processor_clock())


def create_calls(
    pair: SchedulerPair, steps: int = STEPS
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Create the calls that are compared.

    Args:
        pair: scheduler and sampler.
        steps: sampler steps of a call.

    Returns:
        The call with diffcore's scheduler, and the call with that of diffusers.
    """
    unet = build_unet()
    theirs = build_pipeline(unet, getattr(diffusers, pair.scheduler)(**TABLE, **pair.options))
    ours = build_pipeline(build_unet() if pair.attached else unet, theirs.scheduler)
    ours.unet.load_state_dict(unet.state_dict())
    if pair.attached:
        attach(ours, CFG(SCALE), pair.sampler)
    else:
        ours.scheduler = DiffcoreScheduler.from_config(
            theirs.scheduler.config, sampler=pair.sampler
        )
    return (lambda: call(ours, steps)), (lambda: call(theirs, steps))


def build_unet() -> Any:
    """Build a network of 36 thousand parameters, beside which the cost of a step is visible.

    Returns:
        The network, in evaluation mode.
    """
    made: Any = diffusers.UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=SIZE,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return made.eval()


def build_pipeline(unet: Any, scheduler: Any) -> Any:
    """Build a pipeline without text encoder, and with a VAE that is not used.

    Args:
        unet: network.
        scheduler: scheduler.

    Returns:
        The StableDiffusionPipeline.
    """
    vae: Any = diffusers.AutoencoderKL(  # type: ignore[no-untyped-call]
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    made: Any = diffusers.StableDiffusionPipeline(  # type: ignore[no-untyped-call]
        vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **others
    )
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe: Any, steps: int) -> Tensor:
    """Call a pipeline with fixed prompts and noise.

    Args:
        pipe: the pipeline.
        steps: sampler steps.

    Returns:
        The latents (1, 4, SIZE, SIZE).
    """
    generator = torch.Generator().manual_seed(0)
    prompt, negative = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    latents: Tensor = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        guidance_scale=SCALE,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).images
    return latents
