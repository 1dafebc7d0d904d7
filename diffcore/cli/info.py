"""`diffcore info`: what a run is, or what this machine has."""

from collections.abc import Sequence
from pathlib import Path

from diffcore import __version__
from diffcore.cli.arguments import normalized, trusted
from diffcore.core.process import Process
from diffcore.io.parser import ComponentParser
from diffcore.run import Run
from diffcore.training.reporting import Metrics


def main(argv: Sequence[str]) -> None:
    """Print a run's facts, or the machine's."""
    parser = ComponentParser(
        prog="diffcore info",
        description="Describe the run in folder RUN; without one, this machine.",
    )
    parser.add_argument(
        "run", type=str, nargs="?", default="", metavar="RUN", help="the folder of a run"
    )
    folder = parser.parse_args(trusted(normalized(argv))).run
    facts = _of_run(Run(Path(folder))) if folder else _of_machine()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _of_run(run: Run) -> dict[str, object]:
    settings, process = run.settings(), Process.load(run.process)
    parameters = sum(p.numel() for p in run.network().parameters())
    reports = Metrics(run.metrics).reports()
    return {
        "run": run.folder,
        "network": f"{settings['network']['class_path']}, {parameters:,} parameters",
        "schedule": process.schedule,
        "levels": f"λ from {process.schedule.logsnr(1.0):g} to {process.schedule.logsnr(0.0):g}",
        "prediction": process.prediction,
        "time": process.time,
        "data": f"shape {process.shape}, range [{process.low:g}, {process.high:g}]",
        "classes": f"{process.classes}, dropped in {process.dropout:.0%} of samples",
        "checkpoints": ", ".join(sorted(path.name for path in run.checkpoints.glob("step-*")))
        or "none",
        "last report": ", ".join(f"{name} {value}" for name, value in reports[-1].items())
        if reports
        else "none",
    }


def _of_machine() -> dict[str, object]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    packages = {}
    for name in ("torch", "accelerate", "safetensors", "jsonargparse", "diffusers", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "diffcore": __version__,
        "python": platform.python_version(),
        **packages,
        "device": device,
    }
