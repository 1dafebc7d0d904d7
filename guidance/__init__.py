"""Guidance: rules that combine a conditional prediction with a reference, one file per rule."""

from diffcore.guidance.base import Guidance
from diffcore.guidance.cfg import CFG

__all__ = ["CFG", "Guidance"]
