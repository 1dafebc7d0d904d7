"""Five guidance rules on exact predictions: the guided field above, samples below."""

from pathlib import Path

from experiments.guidance_fields import PANELS, PROCESS, plot_field, plot_samples

from diffcore.report.figures import create_figure, save_figure

NAMES = (
    "conditional, w = 1",
    "CFG, w = 3",
    "Interval(CFG), (0.3, 1.6]",
    "APG, w = 3",
    "AutoGuidance, w = 2",
)


def draw_guided(path: Path) -> None:
    """Write the fields and samples of the rules `NAMES`.

    Args:
        path: image to write.
    """
    figure, axes = create_figure(len(NAMES), 2, width=2.5, height=2.75)
    for above, below, name in zip(axes[: len(NAMES)], axes[len(NAMES) :], NAMES, strict=True):
        plot_field(above, PANELS[name], PROCESS.schedule.at(0.0))
        share = plot_samples(below, PANELS[name])
        above.set_title(name, fontsize=10)
        below.set_title(f"{share:.0%} in the rare part", fontsize=9, fontweight="normal")
    axes[0].set_ylabel("step from σ/α = 1 to ½")
    axes[len(NAMES)].set_ylabel("400 samples")
    save_figure(figure, path)
