"""Captions of images: the files they are read from, and their variants."""

from diffcore.training.data.captions.choices import CaptionChoices
from diffcore.training.data.captions.files import read_captions
from diffcore.training.data.captions.variants import CaptionVariants

__all__ = ["CaptionChoices", "CaptionVariants", "read_captions"]
