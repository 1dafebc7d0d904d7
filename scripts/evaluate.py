"""`python scripts/evaluate.py RUN`: evaluate a run of the recipe `digits`."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffcore.core.process import Process
from diffcore.evaluation.digits import DigitScore, score_digits
from diffcore.guidance import CFG
from diffcore.io.files import hash_file, write_file
from diffcore.io.specs import to_spec
from diffcore.run import Run
from diffcore.samplers import DDIM
from diffcore.schedules import Trailing

METHOD: dict[str, Any] = {
    "sampler": DDIM(),
    "grid": Trailing(),
    "steps": 25,
    "guidance": CFG(1.5),
}
"""How every run is sampled, whatever its own settings, so that results can be compared."""


def main() -> int:
    """Print the score of a run, write it to evaluation.json, and compare it with bounds.

    Returns:
        The exit status: 1 if the run cannot be evaluated or misses a bound, else 0.
    """
    parser = argparse.ArgumentParser(
        description="Evaluate a run of the recipe digits, and write the result to evaluation.json "
        "in its folder. Exit status 1 if a bound is missed.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--per-label", type=int, default=50, help="samples of each digit (default 50)"
    )
    parser.add_argument(
        "--minimum-accuracy",
        type=float,
        default=0.0,
        help="bound on the share of recognised samples, such as 0.97 (default 0)",
    )
    parser.add_argument(
        "--maximum-distance",
        type=float,
        default=float("inf"),
        help="bound on the Fréchet distance, as a multiple of that of real scans (default inf)",
    )
    arguments = parser.parse_args()
    try:
        run = Run(arguments.run)
        _check_process(Process.load(run.process))
        weights = hash_file(run.weights) if run.weights.is_file() else ""
        score = score_digits(run.denoiser(), **METHOD, per_label=arguments.per_label)
        _write_result(run, score, weights)
    except (OSError, ValueError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 1
    print(score)
    if score.accuracy < arguments.minimum_accuracy:
        print(f"evaluate: the accuracy is below {arguments.minimum_accuracy}", file=sys.stderr)
        return 1
    if score.distance > arguments.maximum_distance * score.real_distance:
        print(
            f"evaluate: the distance is above {arguments.maximum_distance} times that of real "
            "scans",
            file=sys.stderr,
        )
        return 1
    return 0


def _write_result(run: Run, score: DigitScore, weights: str) -> None:
    """Write evaluation.json: the score, and everything that repeats it."""
    result = {
        **asdict(score),
        "seeds": f"0-{score.count - 1}",
        **{name: to_spec(value) for name, value in METHOD.items()},
        "weights": weights,
    }
    write_file(run.evaluation, json.dumps(result, indent=1).encode())


def _check_process(process: Process) -> None:
    """Raise ValueError if a process is not that of the digits."""
    if process.shape != (1, 8, 8) or process.classes != 10:
        raise ValueError(
            f"the run is not one of the digits: its samples have shape {process.shape} and "
            f"{process.classes} classes, expected (1, 8, 8) and 10 of the recipe `digits`"
        )


if __name__ == "__main__":
    sys.exit(main())
