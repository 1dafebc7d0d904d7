"""A diffusers VAE as two maps between images and the latents that a network denoises.

    z = (encoder(image) - shift) · scale,   image = decoder(z / scale + shift)

scale is the config's `scaling_factor` and shift its `shift_factor`. With `latents_mean` and
`latents_std` (one number for each channel) they are scaling_factor / std and the mean.

The VAE is evaluated in its own dtype and on its own device. One in float16 whose config has
`force_upcast` is converted to float32 meanwhile, as in pipelines of diffusers, since its
activations may exceed the range of float16.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffcore.core.network import evaluation_dtype, network_config
from diffcore.core.prediction import at_least_float32

__all__ = ["Latents", "downsampling_factor"]

OUTPUT_NAMES = ("sample", "latent", "latents")
"""Names of the tensor in the outputs of diffusers' encoders and decoders."""
_LOCK = threading.Lock()
_UPCAST: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""VAE that is converted to float32 -> number of evaluations in progress, in several threads."""


@dataclass(frozen=True)
class Latents:
    """The maps from images (B, 3, H, W) in [-1, 1] to latents of about unit variance, and back.

    Args:
        vae: autoencoder of diffusers.

    Example:
        >>> import diffusers
        >>> latents = Latents(diffusers.AutoencoderKL(block_out_channels=(32, 32)))
        >>> latents.factor
        2
    """

    vae: nn.Module

    @property
    def factor(self) -> int:
        """Number of pixels on the side of one latent pixel."""
        return downsampling_factor(network_config(self.vae))

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self._config("out_channels", 3)

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latents of images.

        Args:
            image: images (B, 3, H, W) in [-1, 1].
            generator: generator of a draw from the posterior; None: the posterior's mean.

        Returns:
            Latents (B, C, H / factor, W / factor), of the dtype and on the device of the images.
        """
        mean, std = self.posterior(image)
        if generator is None:
            return mean
        noise = torch.randn(std.shape, generator=generator, device=generator.device)
        return mean + std * noise.to(std)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents; 0 without a posterior.

        Args:
            image: images (B, 3, H, W) in [-1, 1].

        Returns:
            Both, of the dtype and on the device of the images.
        """
        encoded: Any = self._evaluate("encode", image)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:  # such as AutoencoderTiny and AutoencoderDC
            mean = _output_tensor(encoded)
            std = torch.zeros_like(mean)
        mean, std = at_least_float32(mean), at_least_float32(std)
        mean = (mean - self._shift(mean)) * self._scale(mean)
        return mean.to(image), (std * self._scale(std)).to(image)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents; the decoder may leave [-1, 1] a little.

        Args:
            z: latents (B, C, h, w).

        Returns:
            The images, of the dtype and on the device of the latents.
        """
        wide = at_least_float32(z)
        wide = wide / self._scale(wide) + self._shift(wide)
        return _output_tensor(self._evaluate("decode", wide)).to(z)

    def _evaluate(self, method: str, x: Tensor) -> Any:
        """The output of a method of the VAE at x, converted to its dtype and device."""
        with _full_range(self.vae):
            converted = x.to(_device(self.vae, x), evaluation_dtype(self.vae, x.dtype))
            return getattr(self.vae, method)(converted)

    def _scale(self, like: Tensor) -> Tensor | float:
        factor = self._config("scaling_factor", 1.0)
        std = self._config("latents_std", None)
        return factor if std is None else factor / _per_channel(std, like)

    def _shift(self, like: Tensor) -> Tensor | float:
        mean = self._config("latents_mean", None)
        return self._config("shift_factor", 0.0) if mean is None else _per_channel(mean, like)

    def _config(self, name: str, default: Any) -> Any:
        value = network_config(self.vae).get(name)
        return default if value is None else value


@contextmanager
def _full_range(vae: nn.Module) -> Iterator[None]:
    """Convert a VAE in float16 to float32 within the block, if its config has `force_upcast`."""
    with _LOCK:
        is_narrow = evaluation_dtype(vae, torch.float32) == torch.float16
        is_upcast = vae in _UPCAST or (is_narrow and bool(network_config(vae).get("force_upcast")))
        if is_upcast:
            _UPCAST[vae] = _UPCAST.get(vae, 0) + 1
            vae.to(torch.float32)
    try:
        yield
    finally:
        if is_upcast:
            with _LOCK:
                _UPCAST[vae] -= 1
                if not _UPCAST[vae]:
                    del _UPCAST[vae]
                    vae.to(torch.float16)


def _device(vae: nn.Module, x: Tensor) -> torch.device:
    """The device on which a VAE is evaluated, also if accelerate keeps its weights on another."""
    offloaded = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
    if offloaded is not None:
        return torch.device(offloaded)
    return next((parameter.device for parameter in vae.parameters()), x.device)


def downsampling_factor(config: Any) -> int:
    """Number of pixels on the side of one latent pixel.

    Args:
        config: a VAE's config.

    Returns:
        2 to the number of downsampling blocks.

    Raises:
        ValueError: the config does not list the VAE's blocks.
    """
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if blocks is None:
        raise ValueError(
            "the VAE's config has no block_out_channels, whose number gives the pixels of a latent"
        )
    return int(2 ** (len(blocks) - 1))


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(
        1, -1, *[1] * (like.ndim - 2)
    )


def _output_tensor(output: Any) -> Tensor:
    """The tensor of an encoder's or decoder's output."""
    if isinstance(output, tuple):
        return output[0]
    names = [name for name in OUTPUT_NAMES if hasattr(output, name)]
    return getattr(output, names[0]) if names else output
