"""What a run writes beside its checkpoints: its averaged weights, and a diffusers pipeline of them.

pipeline/ holds the averaged network with process, sampler, grid and guidance. An
`ExportableNetwork` (such as `PretrainedNetwork`) writes its own pipeline or adapter instead.

checkpoints/outputs.json holds the SHA-256 of these files, of the manifest of the checkpoint that
they belong to, and the settings that they contain. It is written last: when a run resumes, files
that differ from it are written again from the newest checkpoint.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import ExportableNetwork, class_name, unwrap
from diffcore.io.files import (
    HASHES,
    hash_file,
    verify_folder,
    write_file,
    write_folder,
)
from diffcore.io.manifest import MANIFEST
from diffcore.io.plain_data import read_json
from diffcore.io.safetensors import write_weights
from diffcore.io.specs import to_spec
from diffcore.run import hash_options
from diffcore.training.checkpoints import checkpoint

if TYPE_CHECKING:
    from diffcore.training.state import TrainState

__all__ = ["RECORD", "exported_names", "update", "write"]

RECORD = "outputs.json"
METHOD = ("sampler", "grid", "sample_steps", "guidance")


def write(
    state: "TrainState", averaged: Mapping[str, Tensor], message: Callable[[str], None]
) -> None:
    """Write the averaged weights and the pipeline of a run, which belong to its newest checkpoint.

    A pipeline that cannot be written does not stop the run.

    Args:
        state: state of the run, whose checkpoint is written already.
        averaged: whole averaged weights of the state.
        message: prints a line to the user.

    Raises:
        WriteError: The averaged weights cannot be written; the older ones are kept.
    """
    run = state.settings.run
    record = run.checkpoints / RECORD
    network = (yaml.safe_load(state.settings.config) or {}).get("network")
    options = {"network": hash_options(network)} if network else {}
    write_weights(run.weights, averaged, step=state.step, **options)
    try:
        _write_pipeline(state, averaged, message)
        write_file(record, json.dumps(_describe(state), indent=1).encode())
    except OSError as error:  # a later save or resume writes it
        record.unlink(missing_ok=True)
        message(f"{error}; the checkpoint of step {state.step} is whole")


def update(
    state: "TrainState", averaged: Mapping[str, Tensor], message: Callable[[str], None]
) -> None:
    """Write the averaged weights and the pipeline again if they are not those of the state.

    Args:
        state: state of the run at its newest checkpoint.
        averaged: whole averaged weights of the state.
        message: prints a line to the user.
    """
    run = state.settings.run
    try:
        recorded = read_json(run.checkpoints / RECORD)
        is_current = recorded == _describe(state)
        for name in exported_names(state):
            verify_folder(run.folder / name)
    except (OSError, ValueError):  # missing or damaged
        is_current = False
    if not is_current:
        message(f"writing the averaged weights and the pipeline of step {state.step} again")
        write(state, averaged, message)


def _describe(state: "TrainState") -> dict[str, Any]:
    """The content of outputs.json."""
    settings, run = state.settings, state.settings.run
    paths = [run.weights, *(run.folder / name for name in exported_names(state))]
    files = [path / HASHES if path.is_dir() else path for path in paths]
    manifest = run.checkpoints / checkpoint.name(state.step) / MANIFEST
    return {
        "checkpoint": hash_file(manifest),
        "method": {name: to_spec(getattr(settings, name)) for name in METHOD},
        "files": {
            str(path.relative_to(run.folder)): hash_file(path) for path in files if path.is_file()
        },
    }


def exported_names(state: "TrainState") -> tuple[str, ...]:
    """Names of the exported files and folders in the run's folder.

    Args:
        state: state of the run.

    Returns:
        The names that the network declares, or that of pipeline/.
    """
    network = unwrap(state.network)
    if isinstance(network, ExportableNetwork):
        return network.exported_names
    return (state.settings.run.pipeline.name,)


def _write_pipeline(
    state: "TrainState", averaged: Mapping[str, Tensor], message: Callable[[str], None]
) -> None:
    """Replace the pipeline of a run; if there can be none, print the reason after the last step."""
    settings = state.settings
    try:
        if not isinstance(unwrap(state.network), ExportableNetwork):
            _save_pipeline(state, averaged)
            return
        with state.averaged_network(averaged) as network:
            exported: Any = unwrap(network)
            exported.export(settings.run.folder, settings.process)
    except ValueError as error:
        older = "an older" if settings.run.pipeline.exists() else "no"
        if state.step == settings.steps:
            message(f"{older} {settings.run.pipeline}: {error}")


def _save_pipeline(state: "TrainState", averaged: Mapping[str, Tensor]) -> None:
    settings = state.settings
    if "diffusers" not in sys.modules:  # then the network is no network of diffusers
        raise ValueError(
            f"the network is a {class_name(state.network)}, and a pipeline holds ModelMixins of "
            "diffusers"
        )
    if settings.source.texts:
        raise ValueError(
            "the network is conditioned on text: start from the network of a pipeline "
            "(PretrainedNetwork), whose text encoders are known"
        )
    from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline

    with state.averaged_network(averaged) as network:
        denoiser = Denoiser(network, settings.process)
        method = (settings.sampler, settings.grid, settings.sample_steps, settings.guidance)
        pipe = DiffcorePipeline.of(denoiser, *method, vae=settings.source.vae)
        write_folder(settings.run.pipeline, pipe.save_pretrained)
