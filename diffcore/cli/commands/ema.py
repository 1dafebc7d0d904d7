"""`diffcore ema`: reconstruct an average of the weights of any length from a run's snapshots."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffcore.cli.weights_file import choose_weights_file, parse_run_request
from diffcore.io.parser import ComponentParser
from diffcore.io.safetensors import write_weights
from diffcore.training.averages.power_ema import find_snapshots, reconstruct

__all__ = ["EMARequest", "main"]


@dataclass(frozen=True)
class EMARequest:
    """Which average to reconstruct, and where to write it.

    Args:
        length: standard deviation of the average's profile over the training, within (0, 0.2886];
            0.1 averages over about the last fifth.
        step: step at which the average ends; 0: the newest snapshot.
        out: safetensors file to write; "": ema-LENGTH.safetensors in the run's folder.
    """

    length: float
    step: int = 0
    out: str = ""


def main(argv: Sequence[str]) -> None:
    """Write the average that the words name, and print the error of its profile.

    Args:
        argv: command-line words after `ema`.
    """
    parser = ComponentParser(
        prog="diffcore ema",
        usage="diffcore ema RUN --length LENGTH [--option value ...]",
        description="Reconstruct an average of the weights of any length from the snapshots of the "
        "run in folder RUN, which trains with --snapshots.lengths '[0.05,0.1]'.",
    )
    run, request = parse_run_request(parser, argv, EMARequest)
    out = choose_weights_file(run, request.out, f"ema-{request.length:g}.safetensors")
    paths = find_snapshots(run.snapshots, request.step or None)
    average, error = reconstruct(paths, request.length, request.step or None)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(out, average, length=str(request.length))
    print(
        f"{len(paths)} snapshots -> {out}: the profile of length {request.length:g} to a relative "
        f"error of {error:.2g}"
    )
