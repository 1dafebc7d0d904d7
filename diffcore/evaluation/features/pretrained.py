"""Features of an image model of transformers, such as DINOv2 or CLIP, from a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.evaluation.features.extractor import (
    Extracted,
    FeatureExtractor,
    resize,
    to_rgb,
    without_logits,
)
from diffcore.io.extras import import_extra
from diffcore.io.plain_data import read_json
from diffcore.io.safetensors import hash_tensors

__all__ = ["NAMES", "PretrainedFeatures", "find_pretrained"]

NAMES = {"clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-base"}
"""Short name -> name of the model on the hub, which is looked up in the local cache only."""
PREPROCESSING = "preprocessor_config.json"
TEXTS = 256
"""Number of texts that are embedded together."""


def find_pretrained(name: str) -> Path:
    """The folder of a model in the local cache of the hub. Nothing is downloaded.

    Args:
        name: name in `NAMES`.

    Returns:
        The folder.

    Raises:
        ValueError: the cache does not hold the model; the message is the remedy.
    """
    hub = import_extra("huggingface_hub", f"The model {name}", extra="diffusers")
    try:
        return Path(hub.snapshot_download(NAMES[name], local_files_only=True))
    except Exception:  # of several classes, which differ between versions
        raise ValueError(
            f"the model {NAMES[name]} is not in the local cache: download it with `hf download "
            f"{NAMES[name]}`, or name its folder, --features FOLDER"
        ) from None


class PretrainedFeatures(FeatureExtractor):
    """Features of an image model of transformers.

    They are the projected image embedding of CLIP-like models; otherwise the pooled output; of
    models without pooling, the mean over space of a convolutional network, or the first token. The
    whole image is resized to the size that the model's preprocessing crops to, and normalised by
    its mean and standard deviation.

    Args:
        folder: folder with config.json, preprocessor_config.json and safetensors.
        device: device of the network.

    Raises:
        ValueError: a file is missing, or weights of the model are.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder = Path(folder)
        self.tokenizer: Any = None
        settings = read_json(folder / PREPROCESSING)
        self.size = _input_size(settings, folder)
        self.mean, self.std = (
            torch.tensor(settings[name], device=device)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        library = import_extra("transformers", "The features of a pretrained model")
        loaded = library.AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        self.network: Any = loaded[0].to(device).eval()
        missing = sorted(loaded[1]["missing_keys"])
        if any("pooler" not in name for name in missing):
            raise ValueError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}")
        self.is_pooled = not missing
        self.device, self.name = torch.device(device), f"{folder.resolve().name}"
        self.digest = hash_tensors(self.network.state_dict())
        self.resizing = f"cubic, antialiased, to {self.size} x {self.size}"

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor | None:
        """Embeddings of texts by the text encoder of a CLIP-like model; long texts are cut.

        Args:
            texts: texts.

        Returns:
            (N, d) embeddings; None if the model has no text encoder.
        """
        if not hasattr(self.network, "get_text_features"):
            return None
        if self.tokenizer is None:
            library = import_extra("transformers", "The features of a pretrained model")
            self.tokenizer = library.AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True
            )
        distinct = list(dict.fromkeys(texts))
        parts = [distinct[start : start + TEXTS] for start in range(0, len(distinct), TEXTS)]
        embedded = torch.cat([self._embed(part) for part in parts])
        row = {text: index for index, text in enumerate(distinct)}
        return embedded[[row[text] for text in texts]]

    def _embed(self, texts: list[str]) -> Tensor:
        words = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = {name: words[name].to(self.device) for name in ("input_ids", "attention_mask")}
        found = self.network.get_text_features(**inputs)
        return without_logits(getattr(found, "pooler_output", found)).features

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        """Features (N, d) of images (N, C, H, W) of bytes."""
        x = resize(to_rgb(images), self.size).to(self.device) / 255
        x = (x - self.mean) / self.std
        if hasattr(self.network, "get_image_features"):
            found = self.network.get_image_features(pixel_values=x)
            return without_logits(getattr(found, "pooler_output", found))
        output = self.network(pixel_values=x)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.is_pooled:
            return without_logits(pooled.flatten(1))
        states = output.last_hidden_state
        return without_logits(states.mean((-2, -1)) if states.ndim == 4 else states[:, 0])


def _input_size(settings: dict[str, Any], folder: Path) -> int:
    """Height and width in pixels that the preprocessing of a model produces."""
    for name in ("crop_size", "size"):
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("height", value.get("shortest_edge"))
        if isinstance(value, int) and 1 <= value <= 4096:
            return value
    raise ValueError(f"{folder / PREPROCESSING} has no size and no crop_size of 1 to 4096 pixels")
