"""The diffusers pipeline that a run writes: pipeline/, its averaged network with process, sampler,
grid and guidance.

An `ExportableNetwork` (such as `PretrainedNetwork`) writes its own pipeline or adapter instead.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import ExportableNetwork, class_name, unwrap
from diffcore.io.files import write_folder

if TYPE_CHECKING:
    from diffcore.training.state import TrainState

__all__ = ["save"]


def save(state: "TrainState", message: Callable[[str], None]) -> None:
    """Replace the pipeline of a run; if there can be none, print the reason after the last step.

    Args:
        state: state of the run.
        message: prints a line to the user.
    """
    settings = state.settings
    try:
        if isinstance(network := unwrap(state.network), ExportableNetwork):
            with state.average.applied():
                network.export(settings.run.folder, settings.process)
        else:
            _save_pipeline(state)
    except ValueError as error:
        if state.step == settings.steps:
            message(f"no {settings.run.pipeline}: {error}")


def _save_pipeline(state: "TrainState") -> None:
    settings = state.settings
    if "diffusers" not in sys.modules:  # then the network is no network of diffusers
        raise ValueError(
            f"the network is a {class_name(state.network)}, and a pipeline holds ModelMixins of "
            "diffusers"
        )
    if settings.source.texts:
        raise ValueError(
            "the network is conditioned on text: start from the network of a pipeline "
            "(PretrainedNetwork), whose text encoders are known"
        )
    from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline

    with state.average.applied():
        denoiser = Denoiser(state.network, settings.process)
        method = (settings.sampler, settings.grid, settings.sample_steps, settings.guidance)
        pipe = DiffcorePipeline.of(denoiser, *method, vae=settings.source.vae)
        write_folder(settings.run.pipeline, pipe.save_pretrained)
