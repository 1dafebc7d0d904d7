"""What a run leaves for diffusers: pipeline/, its averaged network with process, sampler, grid and guidance.

A network that knows a pipeline of its own (Pretrained) saves that, or its adapter.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffcore.core.denoiser import Denoiser
from diffcore.io.files import write_folder

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer


def save(trainer: "Trainer", say: Callable[[str], None]) -> None:
    """Write the run's pipeline/ in place of an older one; where that cannot be, say why as the run ends."""
    try:
        _save(trainer)
    except ValueError as error:
        if trainer.step == trainer.steps:
            say(f"no {trainer.run.pipeline}: {error}")


def _save(trainer: "Trainer") -> None:
    if save := getattr(trainer.bare, "save", None):
        with trainer.average.applied():
            save(trainer.run.folder, trainer.process)
    else:
        _save_ours(trainer)


def _save_ours(trainer: "Trainer") -> None:
    if "diffusers" not in sys.modules:  # and so not imported for a network that is none of its own
        raise ValueError(
            f"the network is a {type(trainer.bare).__name__}, and a pipeline holds ModelMixins of diffusers"
        )
    if getattr(trainer.data, "texts", ()):
        raise ValueError(
            "the network is told text: begin with a pipeline's (Pretrained), which knows what encodes it"
        )
    from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline

    with trainer.average.applied():
        denoiser = Denoiser(trainer.bare, trainer.process)
        ways = (trainer.sampler, trainer.grid, trainer.sample_steps, trainer.guidance)
        pipe = DiffcorePipeline.of(denoiser, *ways, vae=getattr(trainer.data, "vae", None))
        write_folder(trainer.run.pipeline, pipe.save_pretrained)
