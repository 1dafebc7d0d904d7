"""Training objectives: the loss, its weight over noise levels, couplings, and the sampling of
levels.
"""

from diffcore.objectives.coupling import Coupling, IndependentCoupling, OptimalTransport
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import LearnedSchedule, Resampler, SecondMoment
from diffcore.objectives.losses import Huber, Loss, PseudoHuber, SquaredError
from diffcore.objectives.objective import Objective
from diffcore.objectives.uncertainty import Uncertainty
from diffcore.objectives.variational import Variational
from diffcore.objectives.weighting import (
    EDM,
    ELBO,
    MSE,
    P2,
    DebiasedWeight,
    MinSNR,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
    Weight,
)

__all__ = [
    "EDM",
    "ELBO",
    "MSE",
    "P2",
    "Coupling",
    "DebiasedWeight",
    "Draw",
    "Huber",
    "IndependentCoupling",
    "LearnedSchedule",
    "Loss",
    "MinSNR",
    "Objective",
    "OptimalTransport",
    "PseudoHuber",
    "Resampler",
    "SampleKey",
    "SecondMoment",
    "SigmoidWeight",
    "SoftMinSNR",
    "SquaredError",
    "TruncatedSNR",
    "Uncertainty",
    "Variational",
    "Weight",
]
