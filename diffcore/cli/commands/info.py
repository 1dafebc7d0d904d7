"""`diffcore info`: describe a run, or this machine."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffcore import __version__
from diffcore.cli.image_model import is_pipeline
from diffcore.core.network import ExportableNetwork
from diffcore.core.process import Process
from diffcore.io.manifest import checkpoint_folders
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import describe_spec
from diffcore.run import Run
from diffcore.training.reports.metrics import Metrics

__all__ = ["describe_machine", "describe_pipeline", "describe_run", "main"]

PACKAGES = ("torch", "accelerate", "safetensors", "jsonargparse", "diffusers", "transformers")
ESTIMATES = {
    "consistency": ", of the clean end of a flow (consistency)",
    "mean_velocity": ", of the mean velocity between two levels",
    "encoded_mean": ", of x with a learned encoder of x_0",
}
"""Estimate of a process -> what the network gives beside a mean over the data."""


def main(argv: Sequence[str]) -> None:
    """Print the facts of a run or of this machine.

    Args:
        argv: command-line words after `info`.
    """
    parser = ComponentParser(
        prog="diffcore info",
        description="Describe the run in folder RUN: network, process, checkpoints and last "
        "report; or the diffusers pipeline there. Without RUN, describe this machine: versions and "
        "device.",
    )
    parser.add_argument(
        "run",
        type=str,
        nargs="?",
        default="",
        metavar="RUN",
        help="folder of a run or of a diffusers pipeline",
    )
    folder = parser.parse_args(list(argv)).run
    if not folder:
        facts = describe_machine()
    elif is_pipeline(Path(folder)):
        facts = describe_pipeline(Path(folder))
    else:
        facts = describe_run(Run(Path(folder)))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def describe_run(run: Run) -> dict[str, object]:
    """The facts of a run: network, process, checkpoints and last report.

    Args:
        run: folder of the run.

    Returns:
        Values by their name.
    """
    settings, process = run.settings(), Process.load(run.process)
    network = run.architecture()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    classes = "classes" if (settings.get("process") or {}).get("classes") else "distinct captions"
    last_report = [{}, *Metrics(run.metrics).reports()][-1]
    return {
        "run": run.folder,
        "network": f"{_class_path(settings['network'])}, {parameters:,} parameters",
        **(network.facts if isinstance(network, ExportableNetwork) else {}),
        **_describe_process(process),
        "condition": f"{process.classes} {classes}, dropped in {process.dropout:.0%} of samples"
        if process.classes
        else "none",
        "checkpoints": ", ".join(path.name for path in checkpoint_folders(run.checkpoints))
        or "none",
        "weights": ", ".join(run.weight_names()) or "none",
        "last report": ", ".join(
            f"{name} {_shortened(value)}"
            for name, value in last_report.items()
            if not isinstance(value, list)
        )
        or "none",
    }


def describe_pipeline(folder: Path) -> dict[str, object]:
    """The facts of a diffusers pipeline: network, process, and how it is sampled by default.

    Args:
        folder: folder that `save_pretrained` wrote.

    Returns:
        Values by their name.
    """
    from diffcore.integrations.diffusers.loading.folder import sampling_defaults
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

    index = PipelineIndex(folder)
    network = index.read_architecture(index.network_name)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    options = {name: describe_spec(spec) for name, spec in sampling_defaults(folder).items()}
    return {
        "pipeline": f"{folder}, a {index.content['_class_name']}",
        "network": f"{type(network).__name__}, {parameters:,} parameters",
        "scheduler": index.scheduler["_class_name"],
        **_describe_process(Process(**index.process_fields)),
        "sampling": ", ".join(f"{name} {value}" for name, value in options.items()),
    }


def _describe_process(process: Process) -> dict[str, object]:
    """The facts of a process, without its condition."""
    schedule = process.schedule
    return {
        "schedule": schedule,
        "levels": f"λ from {schedule.logsnr(1.0):g} to {schedule.logsnr(0.0):g}"
        + ", learned for each element" * (process.levels == "learned"),
        "prediction": process.prediction
        + ", and a learned variance" * (process.variance == "learned")
        + ESTIMATES.get(process.estimate, ""),
        "time": process.time,
        "data": f"shape {process.shape}, range [{process.low:g}, {process.high:g}]",
    }


def _class_path(spec: Any) -> str:
    return str(spec["class_path"] if isinstance(spec, dict) else spec)


def describe_machine() -> dict[str, object]:
    """The facts of this machine: versions of packages, and the device.

    Returns:
        Values by their name.
    """
    has_accelerator = torch.accelerator.is_available()
    return {
        "diffcore": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": torch.accelerator.current_accelerator() if has_accelerator else "cpu",
    }


def _shortened(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
