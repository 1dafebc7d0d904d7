"""What `diffcore sample` samples: a run, or the folder of a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.run import Run
from diffcore.sampling import images

if TYPE_CHECKING:
    from diffcore.integrations.diffusers import Latents
    from diffcore.integrations.diffusers.loading.folder import PipelineParts


@dataclass(frozen=True)
class Source:
    """A denoiser, and where it works on latents what makes images of them.

    Args:
        denoiser: a network with its process.
        latents: between images and what it works on; None where these are the same.
        text: whether its labels are prompts.
    """

    denoiser: Denoiser
    latents: "Latents | None" = None
    text: bool = False

    @property
    def pictures(self) -> Process:
        """The shape and range of the images."""
        process = self.denoiser.process
        if self.latents is None:
            return process
        height, width = (size * self.latents.factor for size in process.shape[1:])
        return replace(process, shape=(self.latents.channels, height, width), low=-1.0, high=1.0)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """The images of samples (N, *shape), one after the other, on the host."""
        if self.latents is None:
            return x
        return torch.cat(
            [self.latents.decode(row[None].to(self.denoiser.device)).cpu() for row in x]
        )

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """x_0 of an image (C, H, W), on the host."""
        return (
            image
            if self.latents is None
            else self.latents.encode(image[None].to(self.denoiser.device))[0].cpu()
        )


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a pipeline, and a run has not.

    Args:
        prompt: what each label means.
        negative: what the null label means.
        height: of the images in pixels, 0 for the network's own.
        width: of the images in pixels, 0 for the network's own.
    """

    prompt: Sequence[str] = ()
    negative: str = ""
    height: int = 0
    width: int = 0


def is_pipeline(folder: Path) -> bool:
    """Whether diffusers saved a pipeline there."""
    return (folder / "model_index.json").is_file()


def settings(folder: Path) -> dict[str, Any]:
    """How it is sampled unless told otherwise: a run's options; of a pipeline its guidance scale, and our scheduler's parts.

    Raises:
        ValueError: the folder is neither a run's nor a pipeline's.
    """
    if not is_pipeline(folder):
        return Run(folder).settings()
    _quiet()
    from diffcore.integrations.diffusers.loading.folder import sampling_defaults

    return sampling_defaults(folder)


def _quiet() -> None:
    """Leave out transformers' bars and hints, among which an error would be lost."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def source(folder: Path, wanted: Wanted, device: torch.device) -> Source:
    """What is in a folder, ready to sample: a pipeline, or a run, by its pipeline where it has latents, a prompt or a size.

    Raises:
        ValueError: it is neither a run's nor a pipeline's, or what is wanted is not in it.
    """
    if is_pipeline(folder):
        return _of_pipeline(_read(folder), wanted, device)
    run, given = Run(folder), [f"--{name}" for name, value in vars(wanted).items() if value]
    plain = not given and not (run.pipeline / "vae").is_dir()
    if not folder.is_dir() or (plain and images.drawable(Process.load(run.process))):
        return Source(run.denoiser(device))  # which refuses a folder that is not there
    if is_pipeline(run.pipeline):
        return _of_pipeline(_read(run.pipeline), wanted, device)
    denoiser = run.denoiser(device)
    if (adapted := getattr(denoiser.network, "adapted", None)) is not None:
        return _of_pipeline(adapted(folder), wanted, device)
    if given:
        raise ValueError(
            f"{run.pipeline} is missing, without which a run has no {' and no '.join(given)}: leave them out"
        )
    return Source(denoiser)


def _read(folder: Path) -> "PipelineParts":
    from diffcore.integrations.diffusers.loading.folder import (
        read_folder,  # slow to import, and most runs need none of it
    )

    return read_folder(folder)


def _of_pipeline(parts: "PipelineParts", wanted: Wanted, device: torch.device) -> Source:
    from diffcore.integrations.diffusers import Latents, from_diffusers
    from diffcore.integrations.diffusers.families import family_of
    from diffcore.integrations.diffusers.loading.folder import latent_shape

    size: dict[str, Any] = (
        {"shape": latent_shape(parts, wanted.height, wanted.width)}
        if wanted.height or wanted.width
        else {}
    )
    denoiser = from_diffusers(parts, prompts=wanted.prompt, negative=wanted.negative, **size)
    latents = None if parts.vae is None else Latents(parts.vae.to(device).eval())
    return Source(
        denoiser.to(device).eval(),
        latents,
        family_of(parts.network).is_text_conditioned(parts.network),
    )
