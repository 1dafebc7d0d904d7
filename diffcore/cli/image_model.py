"""The model that `diffcore sample` uses: the network of a run, or a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import ExportableNetwork
from diffcore.core.process import Process
from diffcore.guidance import Guidance, load_weaker_networks
from diffcore.run import AVERAGED, Run
from diffcore.sampling import images

if TYPE_CHECKING:
    from diffcore.integrations.diffusers import Latents
    from diffcore.integrations.diffusers.loading.folder import PipelineParts

__all__ = [
    "ImageModel",
    "PipelineOptions",
    "is_pipeline",
    "load_guidance",
    "load_image_model",
    "read_sampling_settings",
]


@dataclass(frozen=True)
class ImageModel:
    """A denoiser, and the encoder and decoder of its latents if it works on latents.

    Args:
        denoiser: network with its process.
        latents: converts between images and latents; None if the denoiser works on images.
        is_text_conditioned: whether a label stands for a prompt.
    """

    denoiser: Denoiser
    latents: "Latents | None" = None
    is_text_conditioned: bool = False

    @property
    def image_process(self) -> Process:
        """The process with the shape and the range of the images."""
        process = self.denoiser.process
        if self.latents is None:
            return process
        height, width = (size * self.latents.factor for size in process.shape[1:])
        return replace(process, shape=(self.latents.channels, height, width), low=-1.0, high=1.0)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode samples into images, one at a time to save memory.

        Args:
            x: (N, *shape) samples.

        Returns:
            (N, C, H, W) images on the CPU.
        """
        if self.latents is None:
            return x
        device = self.denoiser.device
        return torch.cat([self.latents.decode(sample[None].to(device)).cpu() for sample in x])

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encode an image.

        Args:
            image: (C, H, W) image.

        Returns:
            x_0 of the process, without a batch dimension, on the CPU.
        """
        if self.latents is None:
            return image
        return self.latents.encode(image[None].to(self.denoiser.device))[0].cpu()


@dataclass(frozen=True)
class PipelineOptions:
    """Options that only pipelines have.

    Args:
        prompt: prompts; prompt k is label k.
        negative: prompt of the null label.
        height: height of the images in pixels; 0: the network's default.
        width: width of the images in pixels; 0: the network's default.
        lora: adapters, FILE or FILE=STRENGTH.
    """

    prompt: Sequence[str] = ()
    negative: str = ""
    height: int = 0
    width: int = 0
    lora: Sequence[str] = ()


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline that diffusers saved."""
    return (folder / "model_index.json").is_file()


def read_sampling_settings(folder: Path) -> dict[str, Any]:
    """Read how the model in a folder is sampled by default.

    Args:
        folder: folder of a run or of a pipeline.

    Returns:
        Settings of a run's config.yaml, or those of them that a pipeline contains: guidance at its
        default scale, and sampler, grid and steps if its scheduler is a DiffcoreScheduler.

    Raises:
        ValueError: the folder is neither a run's nor a pipeline's.
    """
    if not (is_pipeline(folder) or folder.is_file()):
        return Run(folder).settings()
    from diffcore.integrations.diffusers.loading.folder import sampling_defaults

    return sampling_defaults(folder)


def load_image_model(
    folder: Path, options: PipelineOptions, device: torch.device, weights: str = AVERAGED
) -> ImageModel:
    """Load the model in a folder. Latents, prompts and image sizes of a run need its pipeline.

    Args:
        folder: folder of a run or of a pipeline.
        options: prompts and image size; only pipelines have them.
        device: device of the network.
        weights: weights of a run, see `Run.read_weights`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the folder is neither a run's nor a pipeline's, it cannot follow the options, or
            it does not hold the weights.
    """
    if is_pipeline(folder):
        if weights != AVERAGED:
            raise ValueError(
                f"weights is {weights!r}, but {folder} is a pipeline, which has one set of "
                "weights: name the folder of the run, or leave weights out"
            )
        return _load_pipeline(_read_pipeline(folder, options.lora), options, device)
    run, given = Run(folder), [f"--{name}" for name, value in vars(options).items() if value]
    weights = run.resolve_weights(weights)
    is_plain = not given and not (run.pipeline / "vae").is_dir()
    if not folder.is_dir() or (is_plain and images.is_image(Process.load(run.process))):
        return ImageModel(
            run.denoiser(device, weights=weights)
        )  # raises if there is no such folder
    if is_pipeline(run.pipeline):
        network = None if weights == AVERAGED else _pipeline_network(run, weights)
        parts = _read_pipeline(run.pipeline, options.lora, network)
        return _load_pipeline(parts, options, device)
    denoiser = run.denoiser(device, weights=weights)
    if options.lora:
        raise ValueError(
            f"{folder} is no pipeline and holds none, to which --lora could be added: sample the "
            f"pipeline that it started from, with --lora {folder} beside the others"
        )
    if isinstance(denoiser.network, ExportableNetwork):
        return _load_pipeline(denoiser.network.exported_parts(folder), options, device)
    if given:
        raise ValueError(
            f"{run.pipeline} is missing, without which a run has no {' and no '.join(given)}: "
            "leave them out"
        )
    return ImageModel(denoiser)


def load_guidance(rule: Guidance, options: PipelineOptions, device: torch.device) -> Guidance:
    """Load the weaker networks that a rule names.

    Args:
        rule: guidance rule.
        options: prompts and image size, which those networks have too.
        device: device of the networks.

    Returns:
        The rule with its networks.
    """
    return load_weaker_networks(
        rule, lambda weaker: load_image_model(Path(weaker), options, device).denoiser
    )


def _pipeline_network(run: Run, weights: str) -> nn.Module:
    """The network of a run with other weights, in place of that of its pipeline."""
    from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork

    network = run.denoiser(weights=weights).network
    return network.network if isinstance(network, PretrainedNetwork) else network


def _read_pipeline(
    folder: Path, adapters: Sequence[str], network: nn.Module | None = None
) -> "PipelineParts":
    _silence_transformers()
    # Imported here because it takes seconds, and models without latents do not need it.
    from diffcore.integrations.diffusers.loading.folder import read_folder

    parts = read_folder(folder, network)
    if not adapters:
        return parts
    from diffcore.integrations.diffusers.adapters.adapted_parts import adapt_parts

    return adapt_parts(parts, folder, adapters)


def _load_pipeline(
    parts: "PipelineParts", options: PipelineOptions, device: torch.device
) -> ImageModel:
    from diffcore.integrations.diffusers import Latents, from_diffusers
    from diffcore.integrations.diffusers.families import family_of
    from diffcore.integrations.diffusers.loading.folder import latent_shape

    size: dict[str, Any] = {}
    if options.height or options.width:
        size = {"shape": latent_shape(parts, options.height, options.width)}
    denoiser = from_diffusers(parts, prompts=options.prompt, negative=options.negative, **size)
    latents = None if parts.vae is None else Latents(parts.vae.to(device).eval())
    is_text_conditioned = family_of(parts.network).is_text_conditioned(parts.network)
    return ImageModel(denoiser.to(device).eval(), latents, is_text_conditioned)


def _silence_transformers() -> None:
    """Hide transformers' progress bars and hints, in which an error message would be lost."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
