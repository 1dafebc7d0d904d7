"""`diffcore lora`: merge an adapter into a pipeline, extract one, convert its file, or name the
moved pipeline of a run.

Adapters of all kinds (LoRA, rsLoRA, DoRA, LoHa, LoKr) are merged. Only the low-rank kinds LoRA,
rsLoRA and DoRA are converted, because the other formats express no other change.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcore.integrations.diffusers.adapters.extraction import extract_adapters
from diffcore.integrations.diffusers.adapters.files import (
    adapter_file,
    read_adapters,
    split_strength,
    write_adapters,
)
from diffcore.integrations.diffusers.adapters.layer_names import Format
from diffcore.integrations.diffusers.adapters.lora import ATTENTION_LAYERS
from diffcore.integrations.diffusers.adapters.textual_inversion import LEARNED_EMBEDDINGS
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.folder import merge_into_pipeline
from diffcore.io.files import write_file
from diffcore.io.manifest import checkpoint_folders, read_manifest
from diffcore.io.parser import ComponentParser
from diffcore.run import Run

__all__ = ["BaseRequest", "ConvertRequest", "ExtractRequest", "MergeRequest", "main"]


@dataclass(frozen=True)
class MergeRequest:
    """Adapters (LoRA, rsLoRA, DoRA, LoHa, LoKr) to be added to the weights of a pipeline.

    Args:
        adapters: safetensors files in the format of diffusers, kohya or ComfyUI, or folders of runs
            that trained an adapter; a strength may follow, as in `runs/style=0.8` (default: 1).
        pipeline: folder of the pipeline.
        out: folder of the new pipeline, which must not exist.
    """

    adapters: list[str]
    pipeline: str
    out: str


@dataclass(frozen=True)
class ExtractRequest:
    """The change between two pipelines, to be written as an adapter of low rank.

    Args:
        tuned: folder of the fine-tuned pipeline.
        base: folder of the pipeline that the fine-tuning started from.
        out: safetensors file to write.
        rank: rank of the change of each layer.
        targets: ends of the names of the layers, each of whole words between dots; `all` means
            every linear and convolutional layer.
        format: format of the file.
    """

    tuned: str
    base: str
    out: str
    rank: int = 16
    targets: list[str] = field(default_factory=lambda: list(ATTENTION_LAYERS))
    format: Format = "diffusers"


@dataclass(frozen=True)
class ConvertRequest:
    """The file of a low-rank adapter (LoRA, rsLoRA, DoRA), to be written in another format.

    Args:
        adapter: safetensors file in the format of diffusers, kohya or ComfyUI, or the folder of a
            run that trained an adapter.
        pipeline: folder of the pipeline that the adapter belongs to.
        out: safetensors file to write.
        format: format of the file: diffusers, kohya or comfyui.
    """

    adapter: str
    pipeline: str
    out: str
    format: Format


@dataclass(frozen=True)
class BaseRequest:
    """The pipeline of a run that trained an adapter, which was moved or renamed.

    Args:
        run: folder of the run.
        pipeline: folder where the pipeline lies now; its network has the weights that the adapter
            was trained for.
    """

    run: str
    pipeline: str


def main(argv: Sequence[str]) -> None:
    """Merge, extract or convert an adapter as the words describe.

    Args:
        argv: command-line words after `lora`.
    """
    action, words = (argv[0], argv[1:]) if argv else ("", argv)
    if action not in ACTIONS:
        raise ValueError(f"name what to do with an adapter: {', '.join(ACTIONS)}")
    request, run = ACTIONS[action]
    parser = ComponentParser(
        prog=f"diffcore lora {action}",
        usage=f"diffcore lora {action} {POSITIONAL[action].upper()} --option value ...",
        description=str(request.__doc__).partition("\n")[0],
    )
    position = POSITIONAL[action]
    count = "+" if position == "adapters" else None
    parser.add_argument(position, type=str, metavar=position.upper(), nargs=count)
    parser.add_class_arguments(request, skip={position})
    run(request(**parser.parse_args(list(words)).as_dict()))


def _merge(request: MergeRequest) -> None:
    index = PipelineIndex(Path(request.pipeline))
    changes, scheduler = [], None
    for text in request.adapters:
        path, strength = split_strength(text)
        changes.append((read_adapters(path, index), strength))
        folder = Path(path) / "scheduler"
        scheduler = folder if folder.is_dir() else scheduler
    merge_into_pipeline(Path(request.out), index, changes, scheduler)
    if words := [t for t in request.adapters if _has_word(t)]:
        print(f"the new word of {', '.join(words)} is not merged: load it as textual inversion")
    parts = sorted({part for adapters, _ in changes for part in adapters})
    layers = len({(part, layer) for found, _ in changes for part in found for layer in found[part]})
    print(
        f"{len(changes)} adapter{'s' if len(changes) > 1 else ''} merged into {layers} layers of "
        f"{', '.join(parts)}{', with the scheduler of its run' if scheduler else ''} -> "
        f"{request.out}"
    )


def _has_word(text: str) -> bool:
    """Whether PATH or PATH=STRENGTH names the folder of a run that trained a new word."""
    return (Path(split_strength(text)[0]) / LEARNED_EMBEDDINGS).is_file()


def _extract(request: ExtractRequest) -> None:
    base = PipelineIndex(Path(request.base))
    adapters, share = extract_adapters(
        PipelineIndex(Path(request.tuned)), base, request.rank, request.targets
    )
    write_adapters(request.out, adapters, base, request.format)
    layers = sum(map(len, adapters.values()))
    print(
        f"{layers} layers of rank {request.rank} -> {request.out}: {share:.1%} of the squared norm "
        "of their change"
    )


def _convert(request: ConvertRequest) -> None:
    index = PipelineIndex(Path(request.pipeline))
    adapters = read_adapters(request.adapter, index)
    write_adapters(request.out, adapters, index, request.format)
    layers = sum(map(len, adapters.values()))
    print(f"{layers} layers of {adapter_file(request.adapter)} -> {request.out} ({request.format})")


def _base(request: BaseRequest) -> None:
    run, index = Run(Path(request.run)), PipelineIndex(Path(request.pipeline))
    network = run.settings().get("network")
    arguments = network.get("init_args") if isinstance(network, dict) else None
    if not isinstance(arguments, dict) or "pipeline" not in arguments:
        raise ValueError(f"{run.folder} trained no network of a pipeline: it has no base")
    checkpoints = checkpoint_folders(run.checkpoints)
    expected = read_manifest(checkpoints[-1])["state"].get("network") if checkpoints else None
    # A generator: files of many gigabytes are hashed only until one of the two fits.
    parts = ([index.network_name], [index.network_name, *index.text_encoders])
    if expected and expected not in (index.weights_hash(*names) for names in parts):
        raise ValueError(
            f"the network in {index.folder} has other weights than the one that {run.folder} was "
            "trained for: name the folder to which its pipeline was moved"
        )
    old, new = str(arguments["pipeline"]), str(index.folder.absolute())
    _replace_pipeline(run.config, old, new)
    checked = "the weights are the same" if expected else "its weights were not compared"
    print(f"{run.folder}: {old} -> {new}; {checked}")


def _replace_pipeline(config: Path, old: str, new: str) -> None:
    """Write another folder where a config names a pipeline, and nowhere else: other paths may begin
    with the folder.
    """
    line = re.compile(rf"""^(\s*pipeline:\s*)(["']?){re.escape(old)}\2\s*$""", re.MULTILINE)
    text, count = line.subn(
        lambda match: match[1] + json.dumps(new, ensure_ascii=False),
        config.read_text(encoding="utf-8"),
    )
    if not count:
        raise ValueError(f"{config} has no line 'pipeline: {old}': write {new} in its place there")
    write_file(config, text.encode())


ACTIONS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "merge": (MergeRequest, _merge),
    "extract": (ExtractRequest, _extract),
    "convert": (ConvertRequest, _convert),
    "base": (BaseRequest, _base),
}
POSITIONAL = {"merge": "adapters", "extract": "tuned", "convert": "adapter", "base": "run"}
