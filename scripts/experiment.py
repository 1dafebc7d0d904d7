"""`python scripts/experiment.py NAME`: a study of docs/experiments/NAME.md, which continues what its JSON lines hold.

`fields` draws the pictures of docs/guidance.md instead.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from diffcore.evaluation import fields, guidance_study, study

FOLDER, PICTURES = Path("docs/experiments"), Path("docs/pictures")


def training(out: Path) -> None:
    """Print the tables of schedules, weights and objectives."""
    for place, to in enumerate(("training", "held-out")):
        print(f"\nFréchet distance to the {to} scans\n\n{study.table(study.rows(out), place)}")


def guidance(out: Path) -> None:
    """Print the tables of guidance rules over w, and draw them."""
    measured = study.rows(out)
    for what, title, digits in guidance_study.TABLES:
        print(f"\n{title}\n\n{guidance_study.table(measured, what, digits)}")
    print(f"\nEvaluations that AdaptiveGuidance saves\n\n{guidance_study.savings(measured)}")
    guidance_study.draw(measured, PICTURES)


STUDIES: dict[str, tuple[Callable[[Path, Iterable[int]], Iterator[str]], Callable[[Path], None]]] = {
    "training": (study.study, training),
    "guidance": (guidance_study.study, guidance),
}


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=[*STUDIES, "fields"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    parser.add_argument("--out", type=Path, help="a line of JSON a measurement (docs/experiments/NAME.jsonl)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "fields":
        fields.draw_fields(PICTURES)
        fields.draw_samples(PICTURES)
        return
    out = arguments.out or FOLDER / f"{arguments.what}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    measure, report = STUDIES[arguments.what]
    for row in measure(out, arguments.seeds):
        print(row, flush=True)
    report(out)


if __name__ == "__main__":
    main()
