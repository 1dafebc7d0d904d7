"""What a call of a diffusers pipeline costs with our scheduler: StableDiffusion with a tiny network, beside diffusers' own.

Both sides are the same pipeline class, network, prompts and generator, and make the same latents to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from benchmarks.training_speed import Comparison, check_pairs, interleaved
from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcoreScheduler, attach
from diffcore.samplers import DDIM, DPMSolverPP, Sampler

STEPS = 25
SIZE = 16
"""Of the latents, in each direction."""
SCALE = 7.5
TABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


class Case(NamedTuple):
    """What is compared.

    Args:
        theirs: a scheduler of diffusers.
        options: of its config.
        sampler: ours that does the same.
        attached: whether guidance is ours too.
        bound: the ratio that ours should not exceed.
    """

    theirs: str
    options: dict[str, Any]
    sampler: Sampler
    attached: bool = False
    bound: float = 1.0


CASES = {
    "DDIM": Case("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, DDIM()),
    "DPM++ 2M": Case(
        "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, DPMSolverPP("2M")
    ),
    "DDIM, our CFG attached": Case(
        "DDIMScheduler",
        {"clip_sample": False, "timestep_spacing": "trailing"},
        DDIM(),
        attached=True,
        bound=float("inf"),
    ),
}


def pipelines(pairs: int = 40, steps: int = STEPS) -> list[Comparison]:
    """A call of each case, with CFG.

    Raises:
        ValueError: too few pairs.
    """
    check_pairs(pairs)
    return [
        Comparison(f"{name}, {steps} steps", case.bound, *interleaved(*sides(case, steps), pairs))
        for name, case in CASES.items()
    ]


def sides(case: Case, steps: int = STEPS) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A call with our scheduler, and one with theirs."""
    unet = network()
    theirs = pipeline(unet, getattr(diffusers, case.theirs)(**TABLE, **case.options))
    ours = pipeline(network() if case.attached else unet, theirs.scheduler)
    ours.unet.load_state_dict(unet.state_dict())
    if case.attached:
        attach(ours, CFG(SCALE), case.sampler)
    else:
        ours.scheduler = DiffcoreScheduler.from_config(
            theirs.scheduler.config, sampler=case.sampler
        )
    return (lambda: called(ours, steps)), (lambda: called(theirs, steps))


def network() -> Any:
    """Thirty-six thousand parameters: what a step costs beside it shows."""
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


def pipeline(unet: Any, scheduler: Any) -> Any:
    """Without text encoder, and with a VAE that is not used."""
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


def called(pipe: Any, steps: int) -> Tensor:
    """Latents of fixed prompts and noise."""
    generator = torch.Generator().manual_seed(0)
    prompt, negative = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    made: Tensor = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        guidance_scale=SCALE,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).images
    return made
