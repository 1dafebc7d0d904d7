"""Each picture in light and dark, in a file of few colours."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import get_args

from PIL import Image

from diffcore.io.files import write_file
from diffcore.report.figures import Theme, figure_theme, theme_path

__all__ = ["draw_themes", "reduce_colours"]

COLOURS = 128


def draw_themes(draw: Callable[[Path], None], path: Path) -> None:
    """Draw a picture in each theme.

    Args:
        draw: function that draws the picture to a file.
        path: file of the light one; that of the dark one ends in `-dark`.
    """
    for theme in get_args(Theme):
        out = theme_path(path, theme)
        with figure_theme(theme):
            draw(out)
        if out.is_file():
            reduce_colours(out)


def reduce_colours(path: Path, count: int = COLOURS) -> None:
    """Write a PNG again with a palette, which a third of the bytes holds.

    Args:
        path: the image.
        count: number of colours.
    """
    content = BytesIO()
    with Image.open(path) as image:
        palette = image.convert("RGB").quantize(count, dither=Image.Dither.NONE)
        palette.save(content, format="PNG", optimize=True)
    write_file(path, content.getvalue())
