"""A diffusers VAE as two maps between images and the latents that a network sees.

    z = (encoder(image) - shift) · scale,   image = decoder(z / scale + shift)

scale is `scaling_factor` of its config and shift `shift_factor`, or with latents_mean and latents_std (one a channel) they are
scaling_factor / std and the mean.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Latents:
    """Images (B, 3, H, W) of [-1, 1] to latents of about unit variance, and back.

    Args:
        vae: an autoencoder of diffusers.
    """

    vae: nn.Module

    @property
    def factor(self) -> int:
        """Pixels on the side of a latent."""
        return factor_of(self.vae.config)

    @property
    def channels(self) -> int:
        """Of the images."""
        return self._config("out_channels", 3)

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents: the posterior's mean, or with a generator a draw from it."""
        mean, std = self.posterior(image)
        if generator is None:
            return mean
        return mean + std * torch.randn(std.shape, generator=generator, device=generator.device).to(
            std
        )

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents; of a deterministic autoencoder the deviation is 0."""
        answer: Any = self.vae.encode(image)  # type: ignore[operator]
        if hasattr(answer, "latent_dist"):
            mean, std = answer.latent_dist.mean, answer.latent_dist.std
        else:  # such as AutoencoderTiny and AutoencoderDC
            mean, std = _first(answer), torch.zeros_like(_first(answer))
        return (mean - self._shift(mean)) * self._scale(mean), std * self._scale(std)

    def decode(self, z: Tensor) -> Tensor:
        """Images, in [-1, 1] but for the decoder's excess."""
        return _first(self.vae.decode(z / self._scale(z) + self._shift(z)))  # type: ignore[operator]

    def _scale(self, like: Tensor) -> Tensor | float:
        factor = self._config("scaling_factor", 1.0)
        std = self._config("latents_std", None)
        return factor if std is None else factor / _channels(std, like)

    def _shift(self, like: Tensor) -> Tensor | float:
        mean = self._config("latents_mean", None)
        return self._config("shift_factor", 0.0) if mean is None else _channels(mean, like)

    def _config(self, name: str, default: Any) -> Any:
        value = getattr(self.vae.config, name, None)
        return default if value is None else value


def factor_of(config: Any) -> int:
    """Pixels on the side of a latent, by a VAE's config."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if blocks is None:
        raise ValueError(
            "the VAE's config has no block_out_channels, which say how many pixels a latent stands for"
        )
    return int(2 ** (len(blocks) - 1))


def _channels(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(
        1, -1, *[1] * (like.ndim - 2)
    )


def _first(answer: Any) -> Tensor:
    return (
        answer[0]
        if isinstance(answer, tuple)
        else getattr(answer, "sample", getattr(answer, "latent", answer))
    )
