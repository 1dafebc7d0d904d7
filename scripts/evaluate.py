"""`python scripts/evaluate.py RUN`: how good a run of the recipe digits is. Exit status 1 where a bound is missed."""

import argparse
import sys
from pathlib import Path

from diffcore.evaluation.digits import score
from diffcore.run import Run


def main() -> int:
    """Score the run and compare with the bounds, if any."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--per-label", type=int, default=50, help="samples of each digit")
    parser.add_argument(
        "--least-recognised", type=float, default=0.0, help="share of samples, such as 0.97"
    )
    parser.add_argument(
        "--most-distance", type=float, default=float("inf"), help="as a multiple of the real scans'"
    )
    args = parser.parse_args()
    try:
        found = score(Run(args.run).denoiser(), per_label=args.per_label)
    except ValueError as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 1
    print(found)
    kept = (
        found.recognised >= args.least_recognised
        and found.distance <= args.most_distance * found.distance_real
    )
    if not kept:
        print("evaluate: a bound is missed", file=sys.stderr)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
