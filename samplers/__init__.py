"""Samplers: pure state machines that integrate the reverse process, one file per family."""

from diffcore.samplers.adams import AdamsBashforth
from diffcore.samplers.ancestral import DDPM, EulerAncestral
from diffcore.samplers.base import Sampler, SamplerWrapper, State
from diffcore.samplers.blending import AlphaBlending
from diffcore.samplers.ddim import DDIM
from diffcore.samplers.dpm_sde import DPMSolverSDE
from diffcore.samplers.dpm_solver import DPMSolverPP
from diffcore.samplers.edm import Euler, Heun
from diffcore.samplers.gradient_estimation import GradientEstimation
from diffcore.samplers.moulton import AdamsMoulton
from diffcore.samplers.predictor_corrector import PredictorCorrector
from diffcore.samplers.restart import Restart
from diffcore.samplers.runge_kutta import AdaptiveRungeKutta
from diffcore.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "AdamsBashforth",
    "AdamsMoulton",
    "AdaptiveRungeKutta",
    "AlphaBlending",
    "DPMSolverPP",
    "DPMSolverSDE",
    "Euler",
    "EulerAncestral",
    "GradientEstimation",
    "Heun",
    "PredictorCorrector",
    "Restart",
    "Sampler",
    "SamplerWrapper",
    "State",
    "UniPC",
]
