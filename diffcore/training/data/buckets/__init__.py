"""Images of several aspect ratios and data of several parts: which items share a batch."""
