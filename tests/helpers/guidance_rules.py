"""Every guidance rule with settings, and every pair of one rule around another.

`RULES` has each rule of the package, `NEUTRAL` each rule that holds rules, `REFUSED` the pairs
(outer, inner) whose construction raises an error.
"""

import inspect
import math

import torch
from torch import Tensor

import diffcore.guidance
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AdaptiveGuidance,
    AutoGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    ComposedConditions,
    CosineScale,
    Guidance,
    Interval,
    Label,
    LinearAG,
    MinorityGuidance,
    Rescale,
    ScaledConditions,
    Sum,
)
from diffcore.schedules import Level, UniformLogSNR
from tests.helpers.oracles import COVARIANCES, MEANS, GaussianMixture, mixture, process

SEEDS, LABELS, STEPS = (3, 1, 4, 15, 9), torch.tensor([0, 1, 1, 0, 1]), 6
GRID = UniformLogSNR(-5.0, 5.0)
RECORD = process()
ORACLE = mixture(RECORD)
WEAKER = GaussianMixture(MEANS, 2 * COVARIANCES, labels=ORACLE.labels, process=RECORD)


def classifier(x: Tensor, level: Level) -> Tensor:
    """Exact logits (B, 2) of noisy x: ln p(x | y) + ln p(y)."""
    logits = [
        ORACLE.log_density(x, level, torch.full((len(x),), y)) + math.log(0.5) for y in (0, 1)
    ]
    return torch.stack(logits, 1)


LEAVES = {
    "CFG": CFG(3.0),
    "CFG by λ": CFG(CosineScale(1.0, 4.0)),
    "CFG of a function": CFG(lambda logsnr: 2.0 + math.tanh(logsnr)),
    "CFG from a negative": CFG(2.0, Label(0)),
    "APG": APG(4.0, momentum=-0.5, threshold=1.0),
    "AutoGuidance": AutoGuidance(2.0, WEAKER),
    "CFGPlusPlus": CFGPlusPlus(0.6),
    "CFGZeroStar": CFGZeroStar(3.0),
    "ClassifierGuidance": ClassifierGuidance(classifier, 2.0, marginal=0.8),
    "MinorityGuidance": MinorityGuidance(classifier, 1.0, label=1),
    "GFCG": GFCG(classifier, 3.0),
    "ComposedConditions": ComposedConditions((1,), (-0.5,), 2.0),
    "ScaledConditions": ScaledConditions(("label",), (2.5,)),
    "Sum": Sum((CFG(2.0), APG(2.0, Label(1)), Interval(CFG(2.0), sigma=(0.5, 2.0)))),
}
COEFFICIENTS = ((), (), (0.1, 0.7, 0.2, 0.1), (), (0.0, 0.9), ())
WRAPPED = {
    "Interval": Interval(APG(4.0), sigma=(0.3, 2.0)),
    "Rescale": Rescale(CFG(5.0), space="v_prediction"),
    "AdaptiveGuidance": AdaptiveGuidance(APG(4.0), threshold=0.9),
    "LinearAG": LinearAG(CFG(3.0), COEFFICIENTS),
}
RULES = LEAVES | WRAPPED

REFUSED = {
    ("Rescale", "Rescale"),
    ("Rescale", "CFGPlusPlus"),
    ("Rescale", "CFGZeroStar"),
    ("AdaptiveGuidance", "ClassifierGuidance"),
    ("AdaptiveGuidance", "MinorityGuidance"),
    ("AdaptiveGuidance", "ComposedConditions"),
    ("AdaptiveGuidance", "ScaledConditions"),
    ("AdaptiveGuidance", "Sum"),
    ("AdaptiveGuidance", "AdaptiveGuidance"),
    ("LinearAG", "ClassifierGuidance"),
    ("LinearAG", "MinorityGuidance"),
    ("LinearAG", "GFCG"),
    ("LinearAG", "ComposedConditions"),
    ("LinearAG", "ScaledConditions"),
    ("LinearAG", "Sum"),
    ("LinearAG", "Interval"),
    ("LinearAG", "AdaptiveGuidance"),
    ("LinearAG", "LinearAG"),
    ("Interval", "LinearAG"),
    ("Sum", "CFGPlusPlus"),
    ("Sum", "CFGZeroStar"),
}
NEUTRAL = {  # wrappers whose settings change nothing
    "Interval": lambda rule: Interval(rule, low=0.0, high=math.inf),
    "Rescale": lambda rule: Rescale(rule, phi=0.0),
    "AdaptiveGuidance": lambda rule: AdaptiveGuidance(rule, threshold=1.0),
    "LinearAG": lambda rule: LinearAG(rule, ((),) * STEPS),
    "Sum": lambda rule: Sum((rule, CFG(1.0))),
}


def rule_classes() -> list[str]:
    """Names of the concrete rules that the package exports, in alphabetical order."""
    return sorted(
        name
        for name, value in vars(diffcore.guidance).items()
        if inspect.isclass(value) and issubclass(value, Guidance) and not inspect.isabstract(value)
    )
