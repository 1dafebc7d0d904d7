"""`diffcore plot schedules`: λ(t), α and σ, and the density p(λ), any number overlaid."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffcore.commands.arguments import normalized, trusted
from diffcore.schedules import Schedule
from diffcore.spec import Parser

SPAN = (-15.0, 15.0)
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]


def main(argv: Sequence[str]) -> None:
    """Draw what the first argument names."""
    parser = Parser(prog="diffcore plot", description="Draw schedules: λ(t), α(t) and σ(t), and the density p(λ).")
    parser.add_argument("what", choices=["schedules"], help="what to draw")
    parser.add_argument(
        "components", type=Schedule, nargs="+", help="by class name, or {class_path: ..., init_args: ...}"
    )
    parser.add_argument("--out", type=Path, default=Path("schedules.png"), help="a .png, .svg or .pdf")
    arguments = parser.instantiate(parser.parse_args(trusted(normalized(argv))))
    out: Path = arguments.out
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out is {out}, expected a .png, .svg or .pdf")
    draw(arguments.components, out)
    print(f"{len(arguments.components)} schedules -> {out}")


def draw(schedules: Sequence[Schedule], out: Path) -> None:
    """Write the picture of some schedules; colours differ in lightness and lines in dashes, so grey prints well."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    logsnr = torch.linspace(*SPAN, 1501, dtype=torch.float64)
    colours = mpl.colormaps["viridis"]
    for place, schedule in enumerate(schedules):
        style = {
            "color": colours(0.85 * place / max(len(schedules) - 1, 1)),
            "ls": DASHES[place % len(DASHES)],
            "lw": 2,
        }
        level = schedule.level(t)
        left.plot(t, level.logsnr, label=str(schedule), **style)
        middle.plot(t, level.alpha, **style)
        middle.plot(t, level.sigma, **{**style, "lw": 1})
        right.plot(logsnr, schedule.density(logsnr), **style)
    left.set(title="noise level", xlabel="t  (0 is data, 1 is noise)", ylabel="λ = log α²/σ²", ylim=SPAN)
    middle.set(title="α (thick) and σ (thin)", xlabel="t  (0 is data, 1 is noise)", ylim=(-0.03, 1.1))
    right.set(title="density of training levels", xlabel="λ = log α²/σ²", ylabel="p(λ) = -dt/dλ", ylim=(0, None))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(schedules), 3), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
