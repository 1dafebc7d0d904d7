"""Guidance: rules that combine a conditional prediction with references, one file per rule.

    guided = ref + w (cond - ref)

`cfg.py` holds this formula, `base.py` the contract of a rule, `reference.py` the references.
"""

from diffcore.guidance.adaptive_guidance import AdaptiveGuidance, LinearAG
from diffcore.guidance.apg import APG
from diffcore.guidance.base import Contrast, Guidance, GuidanceInput, GuidanceWrapper, Step
from diffcore.guidance.cfg import CFG, AutoGuidance
from diffcore.guidance.cfg_plus_plus import CFGPlusPlus
from diffcore.guidance.cfg_zero_star import CFGZeroStar
from diffcore.guidance.classifier import (
    GFCG,
    ClassifierGuidance,
    MinorityGuidance,
    minority_classes,
    minority_score,
)
from diffcore.guidance.composition import ComposedConditions, ScaledConditions, Sum
from diffcore.guidance.evaluation import evaluate_queries
from diffcore.guidance.interval import Interval
from diffcore.guidance.perturbation import AlteredNetwork, PerturbedAttention, SkippedLayers
from diffcore.guidance.reference import (
    Label,
    Reference,
    Unconditional,
    WeakerNetwork,
    Without,
    find_networks,
    load_weaker_networks,
)
from diffcore.guidance.rescale import Rescale
from diffcore.guidance.scale import ConstantScale, CosineScale, LinearScale, Scale, ScaleLike

__all__ = [
    "APG",
    "CFG",
    "GFCG",
    "AdaptiveGuidance",
    "AlteredNetwork",
    "AutoGuidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierGuidance",
    "ComposedConditions",
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
    "ScaledConditions",
    "SkippedLayers",
    "Step",
    "Sum",
    "Unconditional",
    "WeakerNetwork",
    "Without",
    "evaluate_queries",
    "find_networks",
    "load_weaker_networks",
    "minority_classes",
    "minority_score",
]
