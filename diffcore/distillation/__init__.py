"""Few-step generators: frozen teachers, and the networks that are distilled from them."""

from diffcore.distillation.consistency import Consistency, ContinuousConsistency
from diffcore.distillation.flow_pairs import FlowPairs
from diffcore.distillation.intervals import KnotIntervals, ShrinkingIntervals
from diffcore.distillation.matching.adversarial import DiffusionGAN, SelfCooperative
from diffcore.distillation.matching.denoising_gan import DenoisingGAN, NoiseChannels
from diffcore.distillation.matching.discriminator import (
    Discriminator,
    FeatureDiscriminator,
    NetworkDiscriminator,
)
from diffcore.distillation.matching.distribution_matching import (
    DistributionMatching,
    ScoreIdentity,
)
from diffcore.distillation.matching.divergence import Divergence
from diffcore.distillation.matching.network_training import NetworkTraining
from diffcore.distillation.matching.reward import RewardTuning
from diffcore.distillation.matching.student import Student
from diffcore.distillation.mean_flow import MeanFlow
from diffcore.distillation.shortcut import Shortcut
from diffcore.distillation.teacher import OracleTeacher, PipelineTeacher, RunTeacher, Teacher

__all__ = [
    "Consistency",
    "ContinuousConsistency",
    "DenoisingGAN",
    "DiffusionGAN",
    "Discriminator",
    "DistributionMatching",
    "Divergence",
    "FeatureDiscriminator",
    "FlowPairs",
    "KnotIntervals",
    "MeanFlow",
    "NetworkDiscriminator",
    "NetworkTraining",
    "NoiseChannels",
    "OracleTeacher",
    "PipelineTeacher",
    "RewardTuning",
    "RunTeacher",
    "ScoreIdentity",
    "SelfCooperative",
    "Shortcut",
    "ShrinkingIntervals",
    "Student",
    "Teacher",
]
