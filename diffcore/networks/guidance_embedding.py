"""Networks that receive the scale of guidance which they were distilled to reproduce."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from diffcore.networks.time_embedding import EmbeddingAdapter, added_to_time, build_addition

__all__ = ["GuidanceEmbedding"]


class GuidanceEmbedding(EmbeddingAdapter):
    """A network that receives the scale w of guidance as the condition `guidance_scale`.

        e = E(t) + W' silu(W s(c w) + b) + b',   F = network(x, t, ...) with e for E(t)

    E is the network's own embedding of the time t, and s are sinusoids. W' and b' are 0 at
    initialisation, so that the network starts as the one without w: a run can start from the
    weights of that one (`init`). `FewStepObjective.guidance_range` trains it.

    Source: Luo et al. 2023 (2310.04378, section 4.2) add a projection of sinusoids of 1000 w to
    the features of the time. Here c is 100: with few training steps the fastest sinusoids should
    not turn many times between neighbouring w.

    Args:
        network: class and options of the network: a UNet2DModel, UNet2DConditionModel or
            DiTTransformer2DModel of diffusers, a Perceptron or UNet3d, or one whose embedding is
            named in `embeddings`.
        embeddings: names of the modules that embed the time, (B, width) each; []: found by the
            names that diffusers gives them.
        scale: factor c of w.

    Raises:
        ValueError: no module embeds the time, or the scale is not positive and finite.

    Example:
        >>> import torch
        >>> from diffcore.networks import Perceptron
        >>> network = GuidanceEmbedding(lambda: Perceptron([2], width=8))
        >>> network(torch.ones(3, 2), torch.zeros(3), guidance_scale=torch.full((3, 1), 2.0)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        embeddings: Sequence[str] = (),
        scale: float = 100.0,
    ) -> None:
        super().__init__(network, scale, "w")
        self.guidance = build_addition(self.network, embeddings)

    def forward(self, x: Tensor, timestep: Tensor, guidance_scale: Tensor, **arguments: Any) -> Any:
        """The network's output for x, the time and the scale of guidance.

        Args:
            x: noisy samples (B, *shape).
            timestep: time input (B,) of the level of x.
            guidance_scale: w (B, 1); 1 is the conditional model.
            **arguments: other arguments of the network.

        Returns:
            The output of the network, of the shape of x.
        """
        with added_to_time(self.guidance, self.scale * guidance_scale.flatten(1)[:, 0]):
            return self.network(x, timestep, **arguments)
