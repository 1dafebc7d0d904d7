"""`diffcore info`: describe a run, or this machine."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffcore import __version__
from diffcore.core.network import ExportableNetwork
from diffcore.core.process import Process
from diffcore.io.manifest import checkpoint_folders
from diffcore.io.parser import ComponentParser
from diffcore.run import Run
from diffcore.training.reports.metrics import Metrics

__all__ = ["describe_machine", "describe_run", "main"]

PACKAGES = ("torch", "accelerate", "safetensors", "jsonargparse", "diffusers", "transformers")


def main(argv: Sequence[str]) -> None:
    """Print the facts of a run or of this machine.

    Args:
        argv: command-line words after `info`.
    """
    parser = ComponentParser(
        prog="diffcore info",
        description="Describe the run in folder RUN: network, process, checkpoints and last "
        "report. Without RUN, describe this machine: versions and device.",
    )
    parser.add_argument(
        "run", type=str, nargs="?", default="", metavar="RUN", help="folder of a run"
    )
    folder = parser.parse_args(list(argv)).run
    facts = describe_run(Run(Path(folder))) if folder else describe_machine()
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
    schedule = process.schedule
    network = run.architecture()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    classes = "classes" if (settings.get("process") or {}).get("classes") else "distinct captions"
    last_report = [{}, *Metrics(run.metrics).reports()][-1]
    return {
        "run": run.folder,
        "network": f"{_class_path(settings['network'])}, {parameters:,} parameters",
        **(network.facts if isinstance(network, ExportableNetwork) else {}),
        "schedule": schedule,
        "levels": f"λ from {schedule.logsnr(1.0):g} to {schedule.logsnr(0.0):g}"
        + ", learned for each element" * (process.levels == "learned"),
        "prediction": process.prediction
        + ", and a learned variance" * (process.variance == "learned")
        + ", of x with a learned encoder of x_0" * (process.estimate == "encoded_mean"),
        "time": process.time,
        "data": f"shape {process.shape}, range [{process.low:g}, {process.high:g}]",
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
