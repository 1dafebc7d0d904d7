"""Images of Hugging Face data sets, tar files and streams as data sets."""

from diffcore.training.data.collections.hugging_face import HuggingFaceData, HuggingFaceStream
from diffcore.training.data.collections.tar_shards import TarShards
from diffcore.training.data.collections.tar_stream import TarStream

__all__ = ["HuggingFaceData", "HuggingFaceStream", "TarShards", "TarStream"]
