"""`python scripts/gallery.py`: draw the pictures of docs/, in light and dark.

Pictures of samples need runs/digits, which `make demo` trains. All others need no training: they
are computed, or drawn from the stored measurements of docs/.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from pictures.themes import draw_themes

DOCS = Path("docs")
PICTURES = DOCS / "pictures"
Drawing = Callable[[Path], None]


def main() -> None:
    """Draw all pictures, or those of --only."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/.", allow_abbrev=False)
    drawings = {**computed(), **commands(), **measured(), **samples()}
    parser.add_argument(
        "--only", nargs="+", default=list(drawings), choices=drawings, help="names (default: all)"
    )
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only:
        draw_themes(drawings[name], PICTURES / f"{name}.png")
        print(f"{PICTURES / name}.png", flush=True)


def computed() -> Mapping[str, Drawing]:
    """Pictures that are computed from closed forms and exact denoisers.

    Returns:
        Drawings by name.
    """
    from experiments.guidance_fields import draw_fields, draw_samples
    from pictures.concepts import draw_noise_levels, draw_predictions
    from pictures.convergence import draw_convergence
    from pictures.guided import draw_guided

    return {
        "noise-levels": draw_noise_levels,
        "predictions": draw_predictions,
        "convergence": draw_convergence,
        "guided": draw_guided,
        "guidance-fields": draw_fields,
        "guidance-samples": draw_samples,
    }


def commands() -> Mapping[str, Drawing]:
    """Pictures of the commands `diffcore plot ... --out docs/pictures/NAME.png` in the pages.

    Returns:
        Drawings by name.
    """
    lines = [line for page in sorted(DOCS.glob("*.md")) for line in page.read_text().splitlines()]
    plots = [shlex.split(line) for line in lines if line.startswith("diffcore plot ")]
    return {
        Path(words[-1]).stem: partial(_run_plot, words[2:-2])
        for words in plots
        if words[-2] == "--out" and Path(words[-1]).parent == PICTURES
    }


def _run_plot(words: list[str], path: Path) -> None:
    from diffcore.cli.commands.plot import main as plot
    from diffcore.report.figures import current_theme

    plot([*words, "--theme", current_theme(), "--out", str(path)])


def measured() -> Mapping[str, Drawing]:
    """Pictures of the measurements that docs/ stores.

    Returns:
        Drawings by name.
    """
    from benchmarks.suite import draw_ratios
    from experiments import guidance, training, tuning, zero_terminal_snr
    from experiments.study import read_measurements
    from pictures.accuracy import draw_errors, read_summary

    def rows(name: str) -> list[dict[str, object]]:
        return read_measurements(DOCS / "experiments" / f"{name}.jsonl")

    page = (DOCS / "benchmarks.md").read_text("utf-8")
    stored = sorted((DOCS / "benchmarks").glob("*.json"))
    facts = {path.stem: json.loads(path.read_text("utf-8")) for path in stored}
    return {
        "ratios": partial(draw_ratios, facts),
        "accuracy": partial(draw_errors, read_summary(page)),
        "training": lambda path: training.draw(rows("training"), path),
        "tuning": lambda path: tuning.draw(rows("tuning"), path),
        "zero-terminal-snr": lambda path: zero_terminal_snr.draw(rows("zero-terminal-snr"), path),
        **{
            f"guidance-{quantity}": partial(guidance.draw_quantity, rows("guidance"), quantity)
            for quantity in guidance.TITLES
        },
    }


def samples() -> Mapping[str, Drawing]:
    """Pictures of the run runs/digits.

    Returns:
        Drawings by name.
    """
    from pictures.digits import draw_few_steps, draw_fine_tuning, draw_overview, draw_samples

    return {
        "overview": draw_overview,
        "digits": draw_samples,
        "few-steps": draw_few_steps,
        "fine-tuning": draw_fine_tuning,
    }


if __name__ == "__main__":
    main()
