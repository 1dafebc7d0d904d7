"""Guidance: rules that combine a conditional prediction with what they move away from, one file per rule."""

from diffcore.guidance.adaptive_guidance import AdaptiveGuidance
from diffcore.guidance.apg import APG
from diffcore.guidance.base import Contrast, Guidance, GuidanceInput, GuidanceWrapper, Step
from diffcore.guidance.cfg import CFG, AutoGuidance
from diffcore.guidance.cfg_plus_plus import CFGPlusPlus
from diffcore.guidance.cfg_zero_star import CFGZeroStar
from diffcore.guidance.classifier import (
    ClassifierGuidance,
    MinorityGuidance,
    minority_levels,
    minority_score,
)
from diffcore.guidance.composition import Composed, Sum
from diffcore.guidance.gfcg import GFCG
from diffcore.guidance.interval import Interval
from diffcore.guidance.linear_ag import LinearAG
from diffcore.guidance.perturbation import Altered, PerturbedAttention, SkippedLayers
from diffcore.guidance.reference import (
    Label,
    Reference,
    Unconditional,
    Weaker,
    evaluate_queries,
    loaded,
    networks,
)
from diffcore.guidance.rescale import Rescale
from diffcore.guidance.scale import ConstantScale, CosineScale, LinearScale, Scale, ScaleLike

__all__ = [
    "APG",
    "CFG",
    "GFCG",
    "AdaptiveGuidance",
    "Altered",
    "AutoGuidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierGuidance",
    "Composed",
    "ConstantScale",
    "Contrast",
    "CosineScale",
    "Guidance",
    "GuidanceInput",
    "GuidanceWrapper",
    "Interval",
    "Label",
    "LinearAG",
    "LinearScale",
    "MinorityGuidance",
    "PerturbedAttention",
    "Reference",
    "Rescale",
    "Scale",
    "ScaleLike",
    "SkippedLayers",
    "Step",
    "Sum",
    "Unconditional",
    "Weaker",
    "evaluate_queries",
    "loaded",
    "minority_levels",
    "minority_score",
    "networks",
]
