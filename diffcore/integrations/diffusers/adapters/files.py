"""Files of low-rank adapters: read in any format, and written in one.

An entry that changes several layers at once (`attn.qkv`) is split into its layers on reading; the
layers are joined to a block-diagonal entry on writing, so that they come back unchanged.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffcore.integrations.diffusers.adapters.layer_names import (
    Format,
    exact_pattern,
    find_pattern,
    known_places,
    written_places,
)
from diffcore.integrations.diffusers.adapters.low_rank import (
    Adapter,
    Change,
    LowRank,
)
from diffcore.integrations.diffusers.adapters.products import (
    PRODUCT_TENSORS,
    FullRank,
    multiply,
)
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.io.files import write_file
from diffcore.io.safetensors import check_header

__all__ = [
    "ADAPTER",
    "Adapters",
    "adapter_file",
    "changes_of",
    "read_adapters",
    "split_strength",
    "write_adapters",
]

ADAPTER = "pytorch_lora_weights.safetensors"
"""Name of the file of an adapter in a folder, which diffusers reads."""
Adapters = dict[str, Adapter]
"""Adapter of each part of a pipeline, such as unet and text_encoder."""
METADATA = "lora_adapter_metadata"
"""Entry of a file of diffusers with α and the ranks."""
ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
} | {f".{name}": name for name in PRODUCT_TENSORS}


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter.

    Args:
        path: the file, or a folder that holds it, such as that of a run.

    Returns:
        The file.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(path)
    file = path / ADAPTER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path} holds no adapter: expected a safetensors file, or a folder with {ADAPTER}"
        )
    return file


def split_strength(text: str) -> tuple[str, float]:
    """Split PATH=STRENGTH.

    Args:
        text: path, which a strength may follow.

    Returns:
        The path, and the strength; 1 without one.

    Raises:
        ValueError: the strength is not finite.
    """
    path, equals, strength = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        number = float(strength)
    except ValueError:
        return text, 1.0
    if not math.isfinite(number):
        raise ValueError(f"lora is {text}, expected a finite strength, such as {path}=0.8")
    return path, number


def changes_of(part: str, changes: Sequence[tuple[Adapters, float]]) -> list[tuple[Adapter, float]]:
    """The changes of one part of a pipeline by several adapters.

    Args:
        part: name of the part.
        changes: changes by part and layer, and the strength of each adapter.

    Returns:
        The changes by layer, and their strengths.
    """
    return [(adapters[part], strength) for adapters, strength in changes if part in adapters]


def read_adapters(path: str | Path, index: PipelineIndex) -> Adapters:
    """Read the adapters of a pipeline from a file of diffusers, kohya or ComfyUI.

    Args:
        path: safetensors file, or a folder that holds one.
        index: pipeline whose layers the file changes.

    Returns:
        The changes by part and layer.

    Raises:
        ValueError: the file is no adapter of a known kind, or the pipeline lacks its layers.
        CorruptFileError: the file cannot be read.
    """
    file = adapter_file(path)
    entries, alphas = _read_entries(file)
    places, found = known_places(index), dict[str, dict[str, Change]]()
    if unknown := sorted(name for name in entries if name not in places):
        raise ValueError(
            f"{file} changes {len(unknown)} of {len(entries)} layers that the pipeline in "
            f"{index.folder} lacks, such as {unknown[0]}: it belongs to another pipeline"
        )
    for name, entry in entries.items():
        part, layers, rows = places[name]
        change = _change(file, name, entry, alphas)
        height = len(change.up if isinstance(change, LowRank) else change.matrix)
        if sum(rows) != height:
            raise ValueError(
                f"{file} has {height} rows in {name}, expected {sum(rows)} of the "
                f"pipeline in {index.folder}: it belongs to another pipeline"
            )
        found.setdefault(part, {}).update(_split(change, layers, rows))
    return {part: changes for part, changes in found.items() if changes}


def write_adapters(
    path: str | Path, adapters: Mapping[str, Adapter], index: PipelineIndex, form: Format
) -> None:
    """Write adapters of a pipeline as one safetensors file.

    Args:
        path: file to write or replace.
        adapters: low-rank changes by part and layer.
        index: pipeline that they belong to.
        form: format of the file.

    Raises:
        ValueError: the format has no name for a layer.
    """
    low_rank = _low_rank(adapters, form)
    places = written_places(index, form)
    left = {(part, layer) for part, changes in low_rank.items() for layer in changes}
    tensors: dict[str, Tensor] = {}
    for name, (part, layers, rows) in places.items():
        found = [low_rank.get(part, {}).get(layer) for layer in layers]
        if any(found):
            tensors |= dict(_tensors(name, _join(name, found, rows), form))
            left -= {(part, layer) for layer in layers}
    if left:
        part, layer = min(left)
        raise ValueError(
            f"the format {form} has no name for {len(left)} layers, such as {layer} of {part}: use "
            "the format diffusers"
        )
    metadata = {METADATA: _metadata(low_rank)} if form == "diffusers" else {}
    write_file(Path(path), save(tensors, {"format": "pt", **metadata}))


def _low_rank(adapters: Mapping[str, Adapter], form: Format) -> dict[str, dict[str, LowRank]]:
    """The changes as those of low rank, which alone the formats express."""
    found: dict[str, dict[str, LowRank]] = {}
    for part, changes in adapters.items():
        for layer, change in changes.items():
            if not isinstance(change, LowRank):
                raise ValueError(
                    f"the adapter of {layer} of {part} is a product (LoHa, LoKr), which is not "
                    f"written in the format {form}: merge it, and extract the change (diffcore "
                    "lora merge, diffcore lora extract)"
                )
            found.setdefault(part, {})[layer] = change
    return found


def _read_entries(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of each entry by their role, and the metadata of diffusers."""
    check_header(file)
    entries: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, "pt") as content:
            metadata = json.loads((content.metadata() or {}).get(METADATA, "{}"))
            keys = content.keys()
            for key in keys:
                ending = next((end for end in ENDINGS if key.endswith(end)), None)
                if ending is None:
                    raise ValueError(
                        f"{file} holds {key}, which is no tensor of a known adapter (LoRA, DoRA, "
                        "LoHa, LoKr): merge an adapter of another kind where it was trained"
                    )
                entry = entries.setdefault(key.removesuffix(ending), {})
                entry[ENDINGS[ending]] = content.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not entries:
        raise ValueError(f"{file} holds no tensors of an adapter")
    return entries, metadata if isinstance(metadata, dict) else {}


def _change(
    file: Path, name: str, entry: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Change:
    """The change of an entry. Its α is in the entry, else in the metadata, else it is r."""
    alpha = entry.get("alpha")
    if not entry.keys().isdisjoint(PRODUCT_TENSORS):
        change = multiply(entry, lambda rank: _product_alpha(metadata, name, rank, alpha))
        if change is None:
            raise ValueError(f"{file} has no matching matrices for {name}")
        return change
    down, up = entry.get("down"), entry.get("up")
    if down is None or up is None or min(down.ndim, up.ndim) < 2 or len(down) != up.shape[1]:
        raise ValueError(f"{file} has no matching pair of matrices for {name}")
    value = _alpha(metadata, name, len(down)) if alpha is None else float(alpha)
    magnitude = entry.get("magnitude")
    return LowRank(down, up, value, None if magnitude is None else magnitude.flatten())


def _product_alpha(
    metadata: Mapping[str, Any], name: str, rank: int, alpha: Tensor | None
) -> float:
    """α of a product; of rank 0, which the tensors do not show, α over the rank of the metadata."""
    if alpha is None:
        value = _layer_setting(metadata, name, "alpha", "alpha_pattern")
    else:
        value = float(alpha)
    if rank:
        return float(rank if value is None else value)
    total = _layer_setting(metadata, name, "r", "rank_pattern")
    return 1.0 if total is None or value is None else float(value) / float(total)


def _alpha(metadata: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = _layer_setting(metadata, name, "lora_alpha", "alpha_pattern")
    # rsLoRA divides alpha by the root of the rank.
    is_rank_stabilised = metadata.get(f"{name.partition('.')[0]}.use_rslora")
    return float(rank if alpha is None else alpha) * (rank**0.5 if is_rank_stabilised else 1.0)


def _layer_setting(metadata: Mapping[str, Any], name: str, key: str, patterns_key: str) -> Any:
    """A setting of peft for the layer of an entry: that of its pattern, else that of the part."""
    part, _, layer = name.partition(".")
    patterns = metadata.get(f"{part}.{patterns_key}") or {}
    pattern = find_pattern(patterns, layer)
    return metadata.get(f"{part}.{key}") if pattern is None else patterns[pattern]


def _split(change: Change, layers: Sequence[str], sizes: Sequence[int]) -> dict[str, Change]:
    """The changes of the layers of one entry, without columns that are zero in a layer."""
    if len(layers) == 1:
        return {layers[0]: change}
    if isinstance(change, FullRank):
        matrices = change.matrix.split(list(sizes))
        return {name: FullRank(matrix) for name, matrix in zip(layers, matrices, strict=True)}
    split: dict[str, Change] = {}
    magnitudes = [None] * len(layers)
    if change.magnitude is not None:
        magnitudes = list(change.magnitude.split(list(sizes)))
    for layer, up, magnitude in zip(layers, change.up.split(list(sizes)), magnitudes, strict=True):
        used = up.flatten(1).any(0)
        rank = int(used.sum())
        if rank or magnitude is not None:
            used = used if rank else torch.ones_like(used)
            rank = int(used.sum())
            down = change.down[used].contiguous()
            alpha = change.alpha * rank / change.rank
            split[layer] = LowRank(down, up[:, used].contiguous(), alpha, magnitude)
    return split


def _join(name: str, changes: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    """One change of several layers, whose up matrix is block-diagonal."""
    if len(changes) == 1 and changes[0] is not None:
        return changes[0]
    present = [change for change in changes if change is not None]
    magnitudes = [change.magnitude for change in present if change.magnitude is not None]
    if magnitudes and len(magnitudes) < len(changes):
        raise ValueError(
            f"{name} joins several layers, and only some of them have a magnitude (DoRA), which "
            "this format cannot express: use the format diffusers"
        )
    factor = present[0].alpha / present[0].rank
    blocks = []
    for change, rows in zip(changes, sizes, strict=True):
        if change is None:
            blocks.append(present[0].up.new_zeros(rows, 0))
        else:
            blocks.append(change.up.flatten(1) * (change.alpha / change.rank / factor))
    down = torch.cat([change.down for change in present])
    magnitude = torch.cat(magnitudes) if magnitudes else None
    return LowRank(down, torch.block_diag(*blocks), factor * len(down), magnitude)


def _tensors(name: str, change: LowRank, form: Format) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an entry by their names in a format."""
    is_diffusers = form == "diffusers"
    yield f"{name}.{'lora_A' if is_diffusers else 'lora_down'}.weight", change.down.contiguous()
    yield f"{name}.{'lora_B' if is_diffusers else 'lora_up'}.weight", change.up.contiguous()
    if not is_diffusers:
        yield f"{name}.alpha", torch.tensor(change.alpha)
    if change.magnitude is not None:
        ending = "lora_magnitude_vector" if is_diffusers else "dora_scale"
        rows = change.magnitude if is_diffusers else change.magnitude[:, None]
        yield f"{name}.{ending}", rows.contiguous()


def _metadata(adapters: Mapping[str, Mapping[str, LowRank]]) -> str:
    """The config of peft of each part, from which diffusers builds the adapter."""
    from peft import LoraConfig

    content: dict[str, Any] = {}
    for part, changes in adapters.items():
        first = next(iter(changes.values()))
        config: Any = LoraConfig(
            r=first.rank,
            lora_alpha=first.alpha,  # type: ignore[arg-type]  # peft divides it by r
            target_modules=sorted(changes),
            rank_pattern={
                exact_pattern(n, changes): c.rank
                for n, c in changes.items()
                if c.rank != first.rank
            },
            alpha_pattern={
                exact_pattern(n, changes): c.alpha
                for n, c in changes.items()
                if c.alpha != first.alpha
            },
            use_dora=first.magnitude is not None,
        )
        content |= {f"{part}.{key}": value for key, value in config.to_dict().items()}
    return json.dumps(content, default=sorted, sort_keys=True)
