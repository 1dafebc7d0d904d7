"""Few-step generators: frozen teachers, and the networks that are distilled from them."""

from diffcore.distillation.flow_pairs import FlowPairs
from diffcore.distillation.teacher import OracleTeacher, PipelineTeacher, RunTeacher, Teacher

__all__ = ["FlowPairs", "OracleTeacher", "PipelineTeacher", "RunTeacher", "Teacher"]
