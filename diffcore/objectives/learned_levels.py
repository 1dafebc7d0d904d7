"""The bound that trains the learned levels of the elements (MuLAN).

    L = mean_i [(λ_max - λ_min) dτ_i/dt ½ SNR_i (x_0i - x̂_0i)²] + KL(q(z | x_0) || N(0, I))/D

is in expectation over t the diffusion term and that of z, in nats per dimension. The other terms of
the bound depend on the ends of the schedule, which are fixed. The gradient of the levels passes
through x, the time conditioning, the weight and dτ/dt. Sahoo et al. 2024 (2312.13236, eq. 10).
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import find_learned_levels
from diffcore.core.process import Process
from diffcore.objectives.coupling import IndependentCoupling
from diffcore.objectives.draw import Draw
from diffcore.objectives.losses import SquaredError
from diffcore.objectives.weighting import ELBO

if TYPE_CHECKING:
    from diffcore.objectives.objective import Objective

__all__ = ["SpreadDraw", "check_learned_process", "spread_draw"]


class SpreadDraw(NamedTuple):
    """A draw with a level of each element.

    Args:
        draw: the draw, with a map of levels on the device of x_0.
        weight: weight of the error of each element; None: 1.
        divergence: (B,) KL(q(z | x_0) || N(0, I)) in nats for each element of x_0; 0 without z.
    """

    draw: Draw
    weight: Tensor | None
    divergence: Tensor | float


def spread_draw(
    denoiser: Denoiser, x0: Tensor, draw: Draw, sample_weight: Tensor | None
) -> SpreadDraw:
    """Replace the level of each sample by those of its elements, if they are learned.

    Args:
        denoiser: network with its process.
        x0: (B, *shape) clean samples, at least float32.
        draw: random numbers of the samples.
        sample_weight: weight of the error, which broadcasts against x_0; None for 1.

    Returns:
        The draw, the weight and the divergence; unchanged and 0 for shared levels.
    """
    if denoiser.process.levels == "shared":
        return SpreadDraw(draw, sample_weight, 0.0)
    learned, key = find_learned_levels(denoiser.network), draw.key
    assert learned is not None
    assert key is not None
    latent = learned.encode(x0, key.seed, key.position)
    time = draw.level.to(x0).t
    assert isinstance(time, Tensor)
    level, slope = learned.spread(denoiser.process.schedule, time, latent.z)
    weight = slope if sample_weight is None else slope * sample_weight.to(slope)
    return SpreadDraw(draw._replace(level=level), weight, latent.divergence / x0[0].numel())


def check_learned_process(objective: "Objective", process: Process) -> None:
    """Raise ValueError if learned levels, or an encoder, would be trained by another loss than the
    bound.

    Args:
        objective: training objective.
        process: process of the network.
    """
    if process.estimate == "encoded_mean":
        part = "the encoder of the process is"
    elif process.levels == "learned":
        part = "the levels of the process are"
    else:
        return
    if objective.weight != ELBO() or not objective.corrected:
        raise ValueError(
            f"{part} learned, and trained by the variational bound: set "
            f"objective.weight to ELBO and objective.corrected to true, not {objective.weight} and "
            f"{str(objective.corrected).lower()}"
        )
    plain = {
        "loss": SquaredError(),
        "coupling": IndependentCoupling(),
        "perturbation": 0.0,
        "offset": 0.0,
        "uncertainty": None,
        "reference_size": 0.0,
        "variational": None,
    }
    changed = [name for name, value in plain.items() if getattr(objective, name) != value]
    if changed:
        raise ValueError(
            f"{part} learned by a bound, which is that of the plain error: "
            f"leave objective.{changed[0]} at its default"
        )
