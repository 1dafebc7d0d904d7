"""`python scripts/evaluate.py RUN`: evaluate a run of the recipe `digits`."""

import argparse
import sys
from pathlib import Path

from diffcore.core.process import Process
from diffcore.evaluation.digits import score_digits
from diffcore.run import Run


def main() -> int:
    """Print the score of a run, and compare it with bounds.

    Returns:
        The exit status: 1 if the run cannot be evaluated or misses a bound, else 0.
    """
    parser = argparse.ArgumentParser(
        description="Evaluate a run of the recipe digits. Exit status 1 if a bound is missed.",
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
        _check_process(Process.load(Run(arguments.run).process))
        score = score_digits(Run(arguments.run).denoiser(), per_label=arguments.per_label)
    except ValueError as error:
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


def _check_process(process: Process) -> None:
    """Raise ValueError if a process is not that of the digits."""
    if process.shape != (1, 8, 8) or process.classes != 10:
        raise ValueError(
            f"the run is not one of the digits: its samples have shape {process.shape} and "
            f"{process.classes} classes, expected (1, 8, 8) and 10 of the recipe `digits`"
        )


if __name__ == "__main__":
    sys.exit(main())
