"""Few-step generators: frozen teachers, and the networks that are distilled from them."""

from diffcore.distillation.consistency import Consistency, ContinuousConsistency
from diffcore.distillation.flow_pairs import FlowPairs
from diffcore.distillation.intervals import KnotIntervals, ShrinkingIntervals
from diffcore.distillation.mean_flow import MeanFlow
from diffcore.distillation.shortcut import Shortcut
from diffcore.distillation.teacher import OracleTeacher, PipelineTeacher, RunTeacher, Teacher

__all__ = [
    "Consistency",
    "ContinuousConsistency",
    "FlowPairs",
    "KnotIntervals",
    "MeanFlow",
    "OracleTeacher",
    "PipelineTeacher",
    "RunTeacher",
    "Shortcut",
    "ShrinkingIntervals",
    "Teacher",
]
