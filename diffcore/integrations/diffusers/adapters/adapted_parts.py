"""The parts of a pipeline with adapters added to their weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from diffcore.integrations.diffusers.adapters.files import (
    ADAPTER,
    changes_of,
    read_adapters,
    split_strength,
)
from diffcore.integrations.diffusers.adapters.low_rank import merge_adapters
from diffcore.integrations.diffusers.adapters.textual_inversion import LEARNED_EMBEDDINGS, add_word
from diffcore.integrations.diffusers.loading.folder import PipelineParts
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.io.plain_data import read_json

__all__ = ["adapt_parts"]


def adapt_parts(parts: PipelineParts, folder: str | Path, adapters: Sequence[str]) -> PipelineParts:
    """Add adapters to the network of a pipeline in place, and to its text encoders once read.

    The result is that of diffusers' `load_lora_weights` and `set_adapters`. The scheduler of the
    last adapter that is a run's takes the place of the pipeline's, because the adapter may have
    been trained on other noise levels. A new word that the run trained is added to the text
    encoders, whatever the strength.

    Args:
        parts: parts of the pipeline.
        folder: folder of the pipeline.
        adapters: files in the format of diffusers, kohya or ComfyUI, or folders of runs; a strength
            may follow, as in `style.safetensors=0.8`.

    Returns:
        The parts, of which the network is the same object.

    Raises:
        ValueError: an adapter cannot be read, or belongs to another pipeline.
    """
    index = PipelineIndex(Path(folder))
    split = [split_strength(text) for text in adapters]
    words = [file for path, _ in split if (file := Path(path) / LEARNED_EMBEDDINGS).is_file()]
    alone = [file.parent for file in words if not (file.parent / ADAPTER).is_file()]
    changes = [
        (read_adapters(path, index), strength)
        for path, strength in split
        if Path(path) not in alone
    ]
    merge_adapters(parts.network, changes_of(index.network_name, changes))
    build = parts.pipeline

    @cache
    def adapted() -> Any:
        assert build is not None
        pipeline = build()
        for name in sorted({part for found, _ in changes for part in found}):
            if name != index.network_name:
                merge_adapters(getattr(pipeline, name), changes_of(name, changes))
        for file in words:
            add_word(pipeline, file)
        return pipeline

    schedulers = [Path(path) / "scheduler" / "scheduler_config.json" for path, _ in split]
    configs = [read_json(path) for path in schedulers if path.is_file()]
    return replace(
        parts,
        scheduler=configs[-1] if configs else parts.scheduler,
        pipeline=None if build is None else adapted,
    )
