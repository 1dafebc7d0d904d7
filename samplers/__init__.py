"""Samplers: pure state machines that integrate the reverse process, one file per family."""

from diffcore.samplers.ancestral import DDPM, EulerAncestral
from diffcore.samplers.base import Sampler, State
from diffcore.samplers.blending import AlphaBlending
from diffcore.samplers.ddim import DDIM
from diffcore.samplers.dpm_sde import DPMSolverSDE
from diffcore.samplers.predictor_corrector import PredictorCorrector
from diffcore.samplers.restart import Restart

__all__ = [
    "DDIM",
    "DDPM",
    "AlphaBlending",
    "DPMSolverSDE",
    "EulerAncestral",
    "PredictorCorrector",
    "Restart",
    "Sampler",
    "State",
]
