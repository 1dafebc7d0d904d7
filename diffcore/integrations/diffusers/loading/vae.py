"""A diffusers VAE as two maps between images and the latents that a network denoises.

    z = (encoder(image) - shift) · scale,   image = decoder(z / scale + shift)

scale is the config's `scaling_factor` and shift its `shift_factor`. With `latents_mean` and
`latents_std` (one number for each channel) they are scaling_factor / std and the mean.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Latents", "downsampling_factor"]


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
        return downsampling_factor(self.vae.config)

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
            Latents (B, C, H / factor, W / factor).
        """
        mean, std = self.posterior(image)
        if generator is None:
            return mean
        return mean + std * torch.randn(std.shape, generator=generator, device=generator.device).to(
            std
        )

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents; 0 without a posterior."""
        encoded: Any = self.vae.encode(image)  # type: ignore[operator]
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:  # such as AutoencoderTiny and AutoencoderDC
            mean, std = _output_tensor(encoded), torch.zeros_like(_output_tensor(encoded))
        return (mean - self._shift(mean)) * self._scale(mean), std * self._scale(std)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents; the decoder may leave [-1, 1] a little."""
        vae: Any = self.vae
        return _output_tensor(vae.decode(z / self._scale(z) + self._shift(z)))

    def _scale(self, like: Tensor) -> Tensor | float:
        factor = self._config("scaling_factor", 1.0)
        std = self._config("latents_std", None)
        return factor if std is None else factor / _per_channel(std, like)

    def _shift(self, like: Tensor) -> Tensor | float:
        mean = self._config("latents_mean", None)
        return self._config("shift_factor", 0.0) if mean is None else _per_channel(mean, like)

    def _config(self, name: str, default: Any) -> Any:
        value = getattr(self.vae.config, name, None)
        return default if value is None else value


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
    return (
        output[0]
        if isinstance(output, tuple)
        else getattr(output, "sample", getattr(output, "latent", output))
    )
