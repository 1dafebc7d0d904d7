"""Data of training: the protocol `DataSource`, data sets, and the keyed order in which they are
read.
"""

from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.arrays import Arrays, Tensors
from diffcore.training.data.collections import (
    HuggingFaceData,
    HuggingFaceStream,
    TarShards,
    TarStream,
)
from diffcore.training.data.conditioned.image_pairs import ConditionFolder
from diffcore.training.data.conditioned.low_resolution import LowResolution
from diffcore.training.data.conditioned.masked_images import MaskedImages
from diffcore.training.data.digits import Digits
from diffcore.training.data.generated import Balls, MovingBalls, Sines, TwoMoons
from diffcore.training.data.image_folder import ImageFolder
from diffcore.training.data.mixture import Mixture
from diffcore.training.data.order import Batch, DataOrder, load_batches
from diffcore.training.data.source import DataSource

__all__ = [
    "Arrays",
    "Balls",
    "Batch",
    "ConditionFolder",
    "DataOrder",
    "DataSource",
    "Digits",
    "HuggingFaceData",
    "HuggingFaceStream",
    "ImageFolder",
    "LowResolution",
    "MaskedImages",
    "Mixture",
    "MovingBalls",
    "Sines",
    "TarShards",
    "TarStream",
    "Tensors",
    "TwoMoons",
    "as_data_source",
    "load_batches",
]
