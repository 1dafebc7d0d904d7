"""Images of several aspect ratios and data of several parts: which items share a batch."""

from diffcore.training.data.buckets.groups import Groups

__all__ = ["Groups"]
