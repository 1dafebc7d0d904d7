"""Few-step generators: frozen teachers, and the networks that are distilled from them."""

from diffcore.distillation.teacher import OracleTeacher, PipelineTeacher, RunTeacher, Teacher

__all__ = ["OracleTeacher", "PipelineTeacher", "RunTeacher", "Teacher"]
