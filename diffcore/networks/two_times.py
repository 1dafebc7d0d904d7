"""Networks of two times: a network of one time that also receives the time of a second level."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from diffcore.networks.time_embedding import EmbeddingAdapter, added_to_time, build_addition

__all__ = ["TwoTimes"]


class TwoTimes(EmbeddingAdapter):
    """A network that receives a second time, for processes that estimate the mean velocity.

        e = E(t) + W' silu(W s(c (t - r)) + b) + b',   F = network(x, t, ...) with e for E(t)

    E is the network's own embedding of the time t, s are sinusoids, and r is the time of the level
    at which the step ends. W' and b' are 0 at initialisation, so that the network starts as the
    network of one time: a run can start from the weights of that one (`init`). Geng et al. 2025
    (2505.13447, table 1c) embed t - r too.

    Args:
        network: class and options of the network: a UNet2DModel, UNet2DConditionModel or
            DiTTransformer2DModel of diffusers, a Perceptron or UNet3d, or one whose embedding is
            named in `embeddings`.
        embeddings: names of the modules that embed the time, (B, width) each; []: found by the
            names that diffusers gives them.
        scale: factor c of t - r, such that it reaches about 10 where the derivative by the time is
            a part of the target (MeanFlow), and at most hundreds elsewhere.

    Raises:
        ValueError: no module embeds the time, or the scale is not positive and finite.

    Example:
        >>> import torch
        >>> from diffcore.networks import Perceptron
        >>> network = TwoTimes(lambda: Perceptron([2], width=8))
        >>> network(torch.ones(3, 2), torch.full((3,), 999.0), end_time=torch.zeros(3)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        embeddings: Sequence[str] = (),
        scale: float = 1.0,
    ) -> None:
        super().__init__(network, scale, "t - r")
        self.interval = build_addition(self.network, embeddings)

    def forward(self, x: Tensor, timestep: Tensor, end_time: Tensor, **arguments: Any) -> Any:
        """The network's output for x and both times.

        Args:
            x: noisy samples (B, *shape).
            timestep: time input (B,) of the level of x.
            end_time: time input (B,) of the level at which the step ends.
            **arguments: other arguments of the network.

        Returns:
            The output of the network, of the shape of x.
        """
        with added_to_time(self.interval, self.scale * (timestep - end_time)):
            return self.network(x, timestep, **arguments)
