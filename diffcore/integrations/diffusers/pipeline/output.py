"""The output of a pipeline: samples, or the images that a VAE decodes from them, in several types.

pil       list of N PIL images
np        array (N, H, W, C) in [0, 1]
pt        tensor (N, C, H, W) in [0, 1]
latent    x_0 (N, *shape) of the network
"""

from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from diffcore.core.process import Process
from diffcore.integrations.diffusers.loading.vae import Latents
from diffcore.sampling import images

__all__ = ["OutputType", "check_output_type", "convert_samples"]

OutputType = Literal["pil", "np", "pt", "latent"]


def check_output_type(output_type: str, process: Process, vae: Any) -> None:
    """Raise ValueError if samples cannot be returned as `output_type`; called before sampling.

    Args:
        output_type: type of the output.
        process: process of the samples.
        vae: decoder of latents; None if the samples are images.
    """
    if output_type not in get_args(OutputType):
        raise ValueError(
            f"output_type is {output_type!r}, expected one of {', '.join(get_args(OutputType))}"
        )
    image_process = _image_process(process, vae)
    if output_type != "latent" and not images.is_image(image_process):
        raise ValueError(
            f"samples of shape {image_process.shape} are not images of 1 or 3 channels: pass "
            "output_type='latent' for x_0"
        )


def convert_samples(x: Tensor, output_type: OutputType, process: Process, vae: Any) -> Any:
    """Decode samples, and convert them to the type of the output.

    Args:
        x: (N, *shape) samples.
        output_type: type of the output.
        process: process of the samples.
        vae: decoder of latents; None if the samples are images.

    Returns:
        N images in the type of the output; `x` itself for "latent".
    """
    if output_type == "latent":
        return x
    image_process = _image_process(process, vae)
    if vae is not None:
        x = Latents(vae).decode(x)
    if output_type == "pil":
        return [images.to_image(array) for array in images.to_pixels(x, image_process)]
    unit = images.to_unit_range(x, image_process)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def _image_process(process: Process, vae: Any) -> Process:
    """The process with the number of channels and the range of the images that a VAE decodes.

    Height and width stay those of the latents, which neither the check nor the conversion reads.
    """
    if vae is None:
        return process
    shape = (Latents(vae).channels, *process.shape[1:])
    return replace(process, shape=shape, low=-1.0, high=1.0)
