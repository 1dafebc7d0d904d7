"""The files of one part of a pipeline's folder, which are checked before the part is loaded.

diffusers and transformers follow what these files name: other files, code on a hub, and sizes.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from diffcore.io.files import CorruptFileError
from diffcore.io.network_size import build_without_memory
from diffcore.io.plain_data import read_json
from diffcore.io.safetensors import count_numbers

__all__ = ["check_files", "check_size", "weight_variant"]

SLACK = 10_000_000
"""Entries of buffers that a network computes and its files need not hold."""
CODE = ("auto_map", "custom_pipelines", "custom_objects")
"""Entries of a config that name code beside the weights or on a hub."""
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Entries of a config that may name code on a hub, as "owner/name"."""


def check_files(folder: str | Path) -> None:
    """Check that the files of a part name neither code nor files outside its folder.

    Args:
        folder: folder of the part, such as unet/ or text_encoder/.

    Raises:
        ValueError: a file names code, pickles, or a file elsewhere, or declares sizes that it does
            not hold.
    """
    folder = Path(folder)
    for path in sorted(folder.glob("*.index.json")):
        _check_index(path)
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.is_file():
            _check_config(path, read_json(path))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder / 'adapter_config.json'} names weights elsewhere: merge the adapter into the "
            "weights, and save them without it"
        )


def _check_index(path: Path) -> None:
    """Refuse an index of weights that names anything but safetensors files beside it."""
    files = read_json(path).get("weight_map")
    wrong = [
        name
        for name in (files.values() if isinstance(files, dict) else [files])
        if not isinstance(name, str)
        or Path(name).name != name
        or Path(name).suffix != ".safetensors"
    ]
    if wrong and not path.name.startswith("pytorch_model"):  # of pickles, which are not opened
        raise ValueError(
            f"{path} names {wrong[0]!r}, expected the names of safetensors files beside it: "
            "pickled weights are not opened, convert them first"
        )


def _check_config(path: Path, value: Any) -> None:
    """Refuse a config that names code at any depth."""
    if isinstance(value, list):
        for item in value:
            _check_config(path, item)
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        is_kernel = name in KERNELS and "/" in str(item)
        is_file = name.endswith("_file") and isinstance(item, str) and Path(item).name != item
        if (name in CODE and item) or is_kernel:
            raise ValueError(
                f"{path} names code in {name} ({item}), and code that comes with weights is not "
                f"executed: remove {name}"
            )
        if is_file and Path(item).is_absolute() and Path(item).exists():
            raise ValueError(
                f"{path} names {item} in {name}, which is outside {path.parent}: remove {name}"
            )
        _check_config(path, item)


def check_size(folder: str | Path, build: Callable[[], nn.Module]) -> None:
    """Check that the config of a model describes no more than its weights' files hold.

    Args:
        folder: folder of the part.
        build: function that builds the model from its config.

    Raises:
        ValueError: a header is corrupt, or the config describes a model of more than twice the
            size.
    """
    folder = Path(folder)
    try:
        held = sum(count_numbers(path) for path in folder.glob("*.safetensors"))
    except CorruptFileError as error:
        raise ValueError(str(error)) from None
    if held:
        try:
            build_without_memory(
                build,
                2 * held + SLACK,
                f"and its safetensors hold {held:,}: they do not belong together",
            )
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None


def weight_variant(folder: str | Path) -> str | None:
    """The variant of a part's weights, which is in the names of their files.

    Args:
        folder: folder of the part.

    Returns:
        The variant, such as "fp16"; None if there are weights without a variant.

    Raises:
        ValueError: there are several variants alone.
    """
    # A shard is named NAME.VARIANT-00001-of-00002.
    stems = [re.sub(r"-\d+-of-\d+$", "", path.stem) for path in Path(folder).glob("*.safetensors")]
    variants = sorted({stem.rpartition(".")[2] for stem in stems if "." in stem})
    if not variants or any("." not in stem for stem in stems):
        return None
    if len(variants) > 1:
        raise ValueError(
            f"{folder} holds the weights of the variants {', '.join(variants)}, expected one: move "
            "the files of the others away"
        )
    return variants[0]
