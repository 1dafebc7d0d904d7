"""What a run leaves for diffusers: pipeline/, its averaged network with process, sampler, grid and guidance."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.denoiser import Denoiser

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
    if "diffusers" not in sys.modules:  # and so not imported for a network that is none of its own
        raise ValueError(
            f"the network is a {type(trainer.bare).__name__}, and a pipeline holds ModelMixins of diffusers"
        )
    from diffcore.integrations.pipeline import DiffcorePipeline

    with trainer.average.applied():
        denoiser = Denoiser(trainer.bare, trainer.process)
        pipe = DiffcorePipeline.of(denoiser, trainer.sampler, trainer.grid, trainer.sample_steps, trainer.guidance)
        replaced(trainer.run.pipeline, pipe.save_pretrained)


def replaced(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder that has its name only once it is whole, in place of an older one."""
    for left in folder.parent.glob(f".{folder.name}.*"):  # by an interrupted write
        shutil.rmtree(left)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
