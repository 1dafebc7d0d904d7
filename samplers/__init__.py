"""Samplers: pure state machines that integrate the reverse process; one module per family."""

from diffcore.samplers.adams import AdamsBashforth, AdamsMoulton
from diffcore.samplers.base import Knots, Sampler, SamplerWrapper, State
from diffcore.samplers.blending import AlphaBlending
from diffcore.samplers.consistency import TCD, Consistency
from diffcore.samplers.ddim import DDIM, DDPM, EulerAncestral
from diffcore.samplers.dpm_solver import DPMSolverPP, DPMSolverSDE
from diffcore.samplers.edm import Euler, Heun
from diffcore.samplers.gradient_estimation import GradientEstimation
from diffcore.samplers.predictor_corrector import PredictorCorrector
from diffcore.samplers.runge_kutta import AdaptiveRungeKutta
from diffcore.samplers.segments import Restart, SegmentSampler
from diffcore.samplers.tuned_multistep import TunedMultistep
from diffcore.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "TCD",
    "AdamsBashforth",
    "AdamsMoulton",
    "AdaptiveRungeKutta",
    "AlphaBlending",
    "Consistency",
    "DPMSolverPP",
    "DPMSolverSDE",
    "Euler",
    "EulerAncestral",
    "GradientEstimation",
    "Heun",
    "Knots",
    "PredictorCorrector",
    "Restart",
    "Sampler",
    "SamplerWrapper",
    "SegmentSampler",
    "State",
    "TunedMultistep",
    "UniPC",
]
