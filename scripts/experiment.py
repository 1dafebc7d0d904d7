"""`python scripts/experiment.py training`: the study of docs/experiments/training.md. It continues what --out holds."""

import argparse
from pathlib import Path

import torch

from diffcore.evaluation.study import rows, study, table


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["training"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/experiments/training.jsonl"), help="a line of JSON a run"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for row in study(arguments.out, arguments.seeds):
        print(row, flush=True)
    for place, to in enumerate(("training", "held-out")):
        print(f"\nFréchet distance to the {to} scans\n\n{table(rows(arguments.out), place)}")


if __name__ == "__main__":
    main()
