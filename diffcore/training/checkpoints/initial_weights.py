"""The weights that a new run starts with: those of a run, a checkpoint, a pipeline or a file.

What does not fit the network is named. If the weights were trained on another process, a line says
so. The checkpoints of the new run hold the hash of the tensors, which a resumed run does not read
again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from diffcore.core.estimate import POINTS_OF_FLOW
from diffcore.core.network import NetworkAdapter, class_name, unwrap
from diffcore.core.process import Process
from diffcore.io.files import CorruptFileError, check_links, verify_folder
from diffcore.io.manifest import MANIFEST, read_manifest
from diffcore.io.safetensors import check_header, hash_tensors, read_weights
from diffcore.io.specs import describe_spec, to_spec
from diffcore.run import AVERAGED, Run, read_checkpoint_weights

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.index import PipelineIndex
    from diffcore.training.state import TrainState

__all__ = ["check_estimate", "check_source", "load_initial_weights"]

NAMED = 3
"""Number of tensors of each kind that a message names."""
COMPARED = ("prediction", "schedule", "time")
"""Fields of the process that are compared with those of the weights."""
INNER = "network."
"""Prefix of the names of an adapter's inner network."""
PIPELINE_INDEX = "model_index.json"


class _Source(NamedTuple):
    """Weights, and the process that they were trained on as far as it is known.

    Args:
        tensors: tensors by name.
        process: specs of fields of the process.
    """

    tensors: dict[str, Tensor]
    process: dict[str, Any]


def check_source(path: str | Path, weights: str) -> None:
    """Check that a path names weights, without reading them.

    Args:
        path: folder of a run, a checkpoint or a pipeline, or a safetensors file.
        weights: averaged or raw.

    Raises:
        ValueError: the path names none of them, or it has no weights of this kind.
    """
    path = Path(path)
    if _is_single(path) and weights != AVERAGED:
        raise ValueError(
            f"init_weights is {weights}, but {path} has one set of weights: leave init_weights out"
        )
    if _is_single(path) or (path / MANIFEST).is_file():
        return
    names = Run(path).weight_names()
    if weights not in names:
        known = f"only {', '.join(names)}" if names else "no weights of a run"
        raise ValueError(
            f"init is {path}, which has {known}, and init_weights is {weights}: name the folder of "
            "a run, of one of its checkpoints, or of a diffusers pipeline, or a safetensors file"
        )


def check_estimate(path: str | Path, own: Process) -> None:
    """Refuse to start from a network of few steps, which the training would make another one.

    Args:
        path: folder that `check_source` accepts, or a safetensors file, which has no process.
        own: process of the training.

    Raises:
        ValueError: the weights are of few steps, and the process is not.
    """
    path, estimate = Path(path), None
    if (path / PIPELINE_INDEX).is_file():
        from diffcore.integrations.diffusers.loading.index import PipelineIndex

        estimate = _pipeline_fields(PipelineIndex(path)).get("estimate")
    elif (path / MANIFEST).is_file():
        settings = read_manifest(path)["state"].get("settings") or {}
        estimate = (settings.get("process") or {}).get("estimate")
    elif path.is_dir() and (process := Run(path).process).is_file():
        estimate = Process.load(process).estimate
    if estimate in POINTS_OF_FLOW and estimate != own.estimate:
        raise ValueError(
            f"init is {path}, a {estimate} network, and process.estimate is {own.estimate}: set "
            f"process.estimate to {estimate} and an objective of such networks, or start from "
            "the network that it was distilled from; a safetensors file starts from any weights"
        )


def _pipeline_fields(index: "PipelineIndex") -> dict[str, Any]:
    """The specs of the fields of the process that the configs of a pipeline determine."""
    try:
        return {name: to_spec(value) for name, value in index.process_fields.items()}
    except (ValueError, KeyError):  # a scheduler that describes no process
        return {}


def _is_single(path: Path) -> bool:
    """Whether a path is that of a file or a pipeline, which have no averaged and raw weights."""
    return path.is_file() or (path / PIPELINE_INDEX).is_file()


def load_initial_weights(state: "TrainState", message: Callable[[str], None]) -> None:
    """Give the network and its average the weights that the settings name. Every rank must call it.

    Args:
        state: state at step 0; changed in place.
        message: prints a line to the user.

    Raises:
        ValueError: The weights cannot be read, or do not fit the network.
    """
    settings, network = state.settings, state.network
    source = _read(Path(settings.init), settings.init_weights, network)
    tensors = _complete(source.tensors, network, message)
    fitting = _fitting(tensors, network, settings.init, settings.init_partial, message)
    # Sharded parameters receive their part of each tensor.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(network, cast("Any", fitting), options=options)
    state.average.load(network.state_dict())
    state.content_hashes["init"] = hash_tensors(source.tensors)
    own = {name: to_spec(getattr(settings.process, name)) for name in COMPARED}
    if other := [
        f"{name} {describe_spec(source.process[name])} (now {describe_spec(value)})"
        for name, value in own.items()
        if source.process.get(name, value) != value
    ]:
        message(f"init: {settings.init} was trained with another {', '.join(other)}")


def _read(path: Path, weights: str, network: nn.Module) -> _Source:
    check_source(path, weights)
    if path.is_file():
        return _Source(_read_file(path), {})
    check_links(path)
    if (path / PIPELINE_INDEX).is_file():
        return _read_pipeline(path, network)
    if (path / MANIFEST).is_file():
        settings = read_manifest(path)["state"].get("settings") or {}
        tensors = read_checkpoint_weights(path, weights).tensors
        return _Source(tensors, settings.get("process") or {})
    run = Run(path)
    process = Process.load(run.process) if run.process.is_file() else None
    fields = {name: to_spec(getattr(process, name)) for name in COMPARED if process}
    return _Source(run.read_weights(weights).tensors, fields)


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a hash that diffcore wrote into it is verified."""
    check_header(path)
    try:
        with safe_open(path, "pt") as file:
            if "diffcore" in (file.metadata() or {}):
                return read_weights(path)
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is no safetensors file ({error})") from None


def _read_pipeline(folder: Path, network: nn.Module) -> _Source:
    """The weights of a pipeline's network, which must be of the class of the trained network."""
    from diffcore.integrations.diffusers.loading.index import PipelineIndex
    from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork

    verify_folder(folder)
    index, own, prefix = PipelineIndex(folder), unwrap(network), ""
    if isinstance(own, PretrainedNetwork):
        own, prefix = own.network, "network."
    found = index.read(index.network_name)
    if not isinstance(own, type(found)):
        raise ValueError(
            f"init is {folder}, whose network is a {type(found).__name__}, but the network is a "
            f"{class_name(own)}: train a network of the same class, or name other weights"
        )
    tensors = {prefix + name: value for name, value in found.state_dict().items()}
    return _Source(tensors, _pipeline_fields(index))


def _complete(
    tensors: dict[str, Tensor], network: nn.Module, message: Callable[[str], None]
) -> dict[str, Tensor]:
    """The weights of an adapter from those of the network inside of it; others as they are."""
    own = network.state_dict()
    is_whole = any(name in own for name in tensors)
    if not isinstance(network, NetworkAdapter) or is_whole:
        return tensors
    inside = _complete(tensors, network.network, message)
    inner = {f"{INNER}{name}": value for name, value in inside.items()}
    added = {name: value for name, value in own.items() if not name.startswith(INNER)}
    message(
        f"init: the weights are those of the network inside of {class_name(network)}, of which "
        f"{len(added)} tensors stay at their initial values: {_first(sorted(added))}"
    )
    return inner | added


def _fitting(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    path: str,
    is_partial: bool,
    message: Callable[[str], None],
) -> dict[str, Tensor]:
    """The tensors that the network has in the same shape.

    Raises:
        ValueError: Some do not fit and all must, or none does.
    """
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    other = {
        name: f"{name} {shapes[name]} in place of {own[name]}"
        for name in sorted(own.keys() & shapes)
        if own[name] != shapes[name]
    }
    missing, unexpected = sorted(own.keys() - shapes), sorted(shapes.keys() - own)
    kinds = {
        "missing": missing,
        "of another shape": list(other.values()),
        "unexpected": unexpected,
    }
    counts = ", ".join(f"{len(n)} {kind} ({_first(n)})" for kind, n in kinds.items() if n)
    # In one order, in which sharded ranks exchange them.
    fitting = {n: tensors[n] for n in sorted(own.keys() & shapes) if n not in other}
    if counts and (not is_partial or not fitting):
        remedy = (
            "name the weights of a network of this class"
            if not fitting
            else "give the network the options of those weights, or set init_partial: true to keep "
            "what they lack at its initial values"
        )
        raise ValueError(
            f"init is {path}, whose weights do not fit the network: {counts} of {len(own)}: "
            f"{remedy}"
        )
    if left := [*missing, *other.values()]:
        message(
            f"init: {len(left)} of {len(own)} tensors stay at their initial values: {_first(left)}"
        )
    if unexpected:
        message(f"init: {len(unexpected)} tensors of {path} are not used: {_first(unexpected)}")
    return fitting


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
