"""Serving: many requests for samples that share the evaluations of one network."""

from diffcore.serving.request import SamplingLimits, SamplingRequest
from diffcore.serving.service import SamplingService

__all__ = ["SamplingLimits", "SamplingRequest", "SamplingService"]
