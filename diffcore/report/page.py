"""The page of a report: one file of HTML that needs no network, on light and dark, narrow and wide.

A content security policy in the page forbids every request.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Section",
    "chart_grid",
    "facts_table",
    "page",
    "picture_slider",
    "text_block",
    "value_table",
]

FILES = files("diffcore.report")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Section(NamedTuple):
    """A section of the page.

    Args:
        title: heading, also in the list of sections.
        body: HTML.
        note: sentence below the heading; "": none.
    """

    title: str
    body: str
    note: str = ""


def page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """Compose the page.

    Args:
        title: heading of the page.
        summary: sentence below it.
        sections: sections; those without a body are left out.

    Returns:
        The HTML.
    """
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(shown))
    style, script = ((FILES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    body = "".join(
        f'<section id="s{index}"><h2>{escape(section.title)}</h2>'
        + (f"<p>{escape(section.note)}</p>" if section.note else "")
        + f"{section.body}</section>\n"
        for index, section in enumerate(shown)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1><p>{escape(summary)}</p><nav>{links}</nav>\n{body}"
        f"<script>{script}</script></body></html>\n"
    )


def chart_grid(charts: Mapping[str, str]) -> str:
    """Cards of charts, as many side by side as the page has room for.

    Args:
        charts: SVG elements by their heading.

    Returns:
        The HTML; "" without charts.
    """
    cards = "".join(
        f'<figure class="card"><h3>{escape(title)}</h3>{svg}</figure>'
        for title, svg in charts.items()
    )
    return cards and f'<div class="grid">{cards}</div>'


def facts_table(facts: Mapping[str, object]) -> str:
    """A table of two columns.

    Args:
        facts: values by their name.

    Returns:
        The HTML; "" without facts.
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return rows and f"<table>{rows}</table>"


def value_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of values with names of its columns.

    Args:
        header: names of the columns.
        rows: cells of each row.

    Returns:
        The HTML; "" without rows.
    """
    names = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return body and f"<table><tr>{names}</tr>{body}</table>"


def picture_slider(pictures: Mapping[str, str | Path]) -> str:
    """Pictures of which a slider shows one at a time, the last one first.

    Args:
        pictures: PNG files by their caption.

    Returns:
        The HTML, which contains the pictures; "" without pictures.
    """
    if not pictures:
        return ""
    images = "".join(
        f'<img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{b64encode(Path(path).read_bytes()).decode()}">'
        for caption, path in pictures.items()
    )
    last = len(pictures) - 1
    return (
        f'<figure class="slider card">{images}<input type="range" min="0" max="{last}" '
        f'value="{last}" aria-label="step"><figcaption></figcaption></figure>'
    )


def text_block(text: str) -> str:
    """Preformatted text.

    Args:
        text: the text.

    Returns:
        The HTML; "" for an empty text.
    """
    return text and f"<pre>{escape(text)}</pre>"
