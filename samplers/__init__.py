"""Samplers: pure state machines that integrate the reverse process, one file per family."""

from diffcore.samplers.base import Sampler, State
from diffcore.samplers.blending import AlphaBlending
from diffcore.samplers.ddim import DDIM

__all__ = ["DDIM", "AlphaBlending", "Sampler", "State"]
