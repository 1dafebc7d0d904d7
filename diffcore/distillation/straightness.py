"""The straightness of a flow: how far its trajectories are from straight lines."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG, Guidance
from diffcore.samplers import DDIM, State
from diffcore.sampling.generation import sample
from diffcore.schedules import UniformBlend

__all__ = ["straightness"]


def straightness(
    denoiser: DenoiserProtocol,
    seeds: Sequence[int] | Tensor,
    condition: Sequence[int] | Tensor | None = None,
    guidance: Guidance = CFG(1.0),
    steps: int = 50,
) -> float:
    """The mean squared deviation of the velocity from the straight line of its trajectory.

        S = ∫ E |(z_1 - z_0) - v(z_a)|² da / D,   z = x/(α+σ),  a = σ/(α+σ),  v = dz/da = ε - x_0

    It is 0 exactly if all trajectories are straight lines, and then one step of Euler is exact.
    Trajectories are solved by Euler's method with steps of equal a, and D is the number of elements
    of x_0.

    Source: Liu et al. 2023 (2209.03003, equation 6, where the sum over elements is not divided).

    Args:
        denoiser: network with its process, or an exact denoiser.
        seeds: N seeds of the noise, one for each trajectory.
        condition: N class labels; None for unconditional trajectories.
        guidance: guidance rule.
        steps: number of steps of Euler's method.

    Returns:
        S, at least 0.

    Example:
        >>> from diffcore.core.oracle import GaussianMixture
        >>> from diffcore.core.process import Process
        >>> process = Process(shape=(2,), classes=0)
        >>> point = GaussianMixture(torch.ones(1, 2), 1e-12 * torch.eye(2)[None], process=process)
        >>> straightness(point, seeds=range(8)) < 1e-6
        True
    """
    starts: list[Tensor] = []
    velocities: list[tuple[float, Tensor]] = []

    def record(_: int, state: State, prediction: Prediction) -> None:
        level = state.level
        if not starts:
            starts.append(state.x / (level.alpha + level.sigma))
        velocities.append((float(level.blend), prediction.eps - prediction.x0))

    samples = sample(
        denoiser,
        DDIM(),
        UniformBlend(),
        steps,
        seeds=seeds,
        condition=condition,
        guidance=guidance,
        batch_size=len(seeds),
        callback=record,
    )
    last = samples.knots[-1]
    line = starts[0].cpu() - samples.x / (last.alpha + last.sigma)
    ends = [*(blend for blend, _ in velocities[1:]), float(last.blend)]
    total = torch.zeros((), dtype=torch.float64)
    for (start, velocity), end in zip(velocities, ends, strict=True):
        total += (start - end) * (line - velocity.cpu()).double().square().mean()
    return float(total)
