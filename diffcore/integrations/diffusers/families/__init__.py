"""What differs between the model families of diffusers: one record each, looked up by class."""

from diffcore.integrations.diffusers.families.family import (
    ClassCondition,
    ExportTarget,
    GuidanceBatching,
    ModelFamily,
    TextCondition,
)
from diffcore.integrations.diffusers.families.records import (
    FAMILIES,
    GENERIC,
    family_of,
    family_of_class,
    family_of_pipeline,
    register_family,
)

__all__ = [
    "FAMILIES",
    "GENERIC",
    "ClassCondition",
    "ExportTarget",
    "GuidanceBatching",
    "ModelFamily",
    "TextCondition",
    "family_of",
    "family_of_class",
    "family_of_pipeline",
    "register_family",
]
