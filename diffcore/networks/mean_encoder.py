"""A network with a learned encoder of x_0, for DiffEnc (`process.estimate: encoded_mean`)."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffcore.core.denoiser import extract_tensor
from diffcore.core.encoding.encoded_mean import MeanEncoder
from diffcore.core.network import evaluation_dtype, network_config

__all__ = ["MeanEncoderNetwork"]


class MeanEncoderNetwork(MeanEncoder):
    """A network with the learned encoder of its process.

        x_φ = (α² + c σ²) x_0 + σ² tanh(encoder(x_0, scale · (λ_max - λ)/(λ_max - λ_min)))

    tanh keeps the encoding within the range of images. An encoder whose last layer is 0 at
    initialisation, as that of `Perceptron`, begins with the linear part alone. The encoder is
    differentiated by λ in forward mode (`torch.func.jvp`). It is used in training and by the bound,
    not in sampling.

    Nielsen et al. 2024 (2310.19789) and the authors' code, with c = 0.

    Args:
        network: class and options of the network of the process.
        encoder: class and options of the encoder, which takes x_0 and a number for each sample, and
            returns the shape of x_0. It receives no condition.
        share: c within [0, 1]: 0 as in DiffEnc; 1 begins as the process without an encoder.
        scale: number that the encoder receives at the noisiest level. Sinusoids of a large number
            change quickly with λ, and so do the derivative and the loss.

    Raises:
        ValueError: the share or the scale is out of range.

    Example:
        >>> import torch
        >>> from diffcore.networks import Perceptron
        >>> from diffcore.schedules import LogLinear
        >>> part = lambda: Perceptron([2], width=8)
        >>> network, level = MeanEncoderNetwork(part, part), LogLinear().level(1.0)
        >>> x0 = torch.ones(1, 2)
        >>> bool(torch.allclose(network.encode(x0, level), level.alpha**2 * x0))
        True
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        encoder: Callable[[], nn.Module],
        share: float = 0.0,
        scale: float = 10.0,
    ) -> None:
        super().__init__(share)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}, expected a positive number of the noisiest level")
        self.network = network()
        self.encoder = encoder()
        self.config = network_config(self.network)
        self.largest = scale

    def forward(self, x: Tensor, time: Tensor, **arguments: Any) -> Any:
        """The output of the network.

        Args:
            x: (B, *shape) noisy samples.
            time: (B,) time conditioning.
            **arguments: other arguments of the network.

        Returns:
            The output of the network, of the shape of x.
        """
        return self.network(x, time, **arguments)

    def residual(self, x0: Tensor, depth: Tensor) -> Tensor:
        dtype = evaluation_dtype(self.encoder, x0.dtype)
        number = (self.largest * depth).flatten().expand(len(x0)).to(dtype)
        output = extract_tensor(self.encoder(x0.to(dtype), number))
        if output.shape != x0.shape:
            raise ValueError(
                f"the output of the encoder has shape {tuple(output.shape)}, expected that of x_0, "
                f"{tuple(x0.shape)}: set its channels and size to them"
            )
        return output.to(x0.dtype).tanh()
