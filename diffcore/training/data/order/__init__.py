"""The order in which a run reads its data, and the micro-batches that are read in it."""

from diffcore.training.data.order.batches import Batch, is_mirrored, load_batches
from diffcore.training.data.order.sequence import DataOrder

__all__ = ["Batch", "DataOrder", "is_mirrored", "load_batches"]
