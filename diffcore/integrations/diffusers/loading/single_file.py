"""A pipeline's folder from a single checkpoint of the original code, or from a hub.

The names of the tensors of a checkpoint are converted by diffusers' `from_single_file`, which needs
the configs and the tokenizers of a pipeline of the same kind.
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffcore.integrations.diffusers.loading.part_files import check_files
from diffcore.integrations.diffusers.loading.parts import read_json
from diffcore.io.files import write_folder
from diffcore.io.lock import wait_for_lock
from diffcore.io.plain_data import hash_data
from diffcore.io.safetensors import check_header

__all__ = ["convert_single_file", "download_pipeline", "is_hub_id"]

CACHE = Path("cache") / "pipelines"
"""Folder of the converted pipelines, beside the cache of latents."""
LIBRARIES = ("diffusers", "transformers")
SAFETY = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that a checkpoint does not hold and a training does not need."""
FAILURES = (OSError, KeyError, RuntimeError, TypeError, ValueError)
"""What diffusers raises for a checkpoint of another kind, beside an error of its own."""
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""Files of a pipeline on a hub: no pickles and no code."""


def convert_single_file(file: str | Path, config: str | Path, cache: str | Path = CACHE) -> Path:
    """Write the pipeline of a checkpoint as a folder, unless it was written before.

    Args:
        file: safetensors file of a whole model: network, VAE and text encoders.
        config: folder of a pipeline of the same kind, of which only configs and tokenizers are
            read.
        cache: folder in which the pipeline's folder is written.

    Returns:
        The folder of the pipeline.

    Raises:
        ValueError: the file is no safetensors file, the folder holds no pipeline of diffusers, or
            they do not belong together.
    """
    file, config = Path(file), Path(config)
    if file.suffix != ".safetensors":
        raise ValueError(
            f"pipeline is {file}, expected a folder or a .safetensors file: pickled weights are "
            "not opened, convert them first"
        )
    check_header(file)
    index = read_json(config / "model_index.json")
    # Configs and tokenizers; the weights beside them are not read.
    suffixes = (".json", ".txt", ".model")
    texts = sorted(p for p in config.rglob("*") if p.suffix in suffixes and p.is_file())
    sources = [(str(path.absolute()), path.stat()) for path in (file, *texts)]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sources]
    folder = Path(cache) / f"{file.stem}-{hash_data(facts)[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of the ranks of a run, one converts.
    with wait_for_lock(folder.parent / f"{folder.name}.lock", f"the conversion of {file}"):
        if not (folder / "model_index.json").is_file():
            _report(f"{file} is converted to {folder}, which later runs read")
            pipeline = _read(file, config, index)
            write_folder(folder, pipeline.save_pretrained)
    return folder


def _read(file: Path, config: Path, index: dict[str, Any]) -> Any:
    """The pipeline of a checkpoint, read by diffusers."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    cls: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(cls, "from_single_file"):
        raise ValueError(
            f"{config} holds a {index.get('_class_name')}, which diffusers reads from no single "
            "file: name the folder of a converted pipeline"
        )
    for name, value in index.items():
        if isinstance(value, list) and value[0] not in (*LIBRARIES, None) and name not in SAFETY:
            raise ValueError(
                f"{config / 'model_index.json'} names {value[0]}.{value[1]} as {name}, which is no "
                "class of diffusers or transformers: code that comes with weights is not executed"
            )
        check_files(config / name)
    parameters = inspect.signature(cls.__init__).parameters
    absent: dict[str, Any] = {name: None for name in SAFETY if name in parameters}
    if "requires_safety_checker" in parameters:
        absent["requires_safety_checker"] = False
    try:
        return cls.from_single_file(str(file), config=str(config), local_files_only=True, **absent)
    except (*FAILURES, SingleFileComponentError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} cannot be read as the {cls.__name__} that {config} describes: {reason}"
        ) from error


def is_hub_id(text: str) -> bool:
    """Whether a text is the id OWNER/NAME of a pipeline on a hub, and no path.

    Args:
        text: value of `--pipeline`.

    Returns:
        True for an id; False if the text or its folder exists.
    """
    is_id = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text) is not None
    return is_id and not Path(text).exists() and not Path(text).parent.exists()


def download_pipeline(name: str, download: Callable[..., str] | None = None) -> Path:
    """Download a pipeline from a hub, or find it in the cache of the hub's library.

    Args:
        name: id OWNER/NAME.
        download: function with the arguments of `huggingface_hub.snapshot_download`; default: that.

    Returns:
        The local folder, without pickles and code.

    Raises:
        ValueError: the hub cannot be reached, or has no such pipeline.
    """
    from huggingface_hub import snapshot_download

    fetch: Callable[..., str] = download or snapshot_download
    try:
        return Path(fetch(name, allow_patterns=PATTERNS, ignore_patterns=["*.non_ema.*"]))
    except Exception as error:  # of the client, of the network, and of the system
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"pipeline is {name}, which is no folder, and no pipeline of this id on a hub could be "
            f"read ({type(error).__name__}: {reason}): name a local folder"
        ) from error


def _report(text: str) -> None:
    print(f"diffcore: {text}", file=sys.stderr)
