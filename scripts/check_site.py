"""Check the built documentation: its reference is complete, and nothing is loaded from elsewhere.

python scripts/check_site.py build/site
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMES = Path(__file__).parents[1] / "tests/public_names.txt"
ANCHOR = re.compile(r'id="(diffcore[\w.]*)"')
LOADED = re.compile(
    r'<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc(?:set)?="(?:https?:)?//[^"]*"'
    r'|<link\b(?![^>]*rel="canonical")[^>]*\bhref="(?:https?:)?//[^"]*"'
)
LOADED_BY_STYLE = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"';]*")
UNRESOLVED = re.compile(r"\]\[")


def main() -> None:
    """Print what is wrong with the site of the first argument, and exit with status 1."""
    site = Path(sys.argv[1])
    problems = [*missing_names(site, NAMES.read_text("utf-8").split()), *defects(site)]
    print("\n".join(problems) or f"{site}: complete, and loads nothing from elsewhere")
    sys.exit(bool(problems))


def missing_names(site: Path, names: Sequence[str]) -> Iterator[str]:
    """Find public names without an entry in the reference.

    Names that a package passes on count as found where they are defined.

    Args:
        site: folder of the built site.
        names: public names, with their modules.

    Yields:
        A line for each missing name.
    """
    pages = (site / "reference").glob("**/*.html")
    found = {anchor for page in pages for anchor in ANCHOR.findall(page.read_text("utf-8"))}
    ends = {anchor.rpartition(".")[2] for anchor in found}
    for name in names:
        package, _, last = name.rpartition(".")
        is_passed_on = package == "diffcore" or package not in found
        is_package = any(anchor.startswith(f"{name}.") for anchor in found)
        if name not in found and not is_package and not (is_passed_on and last in ends):
            yield f"{name} is in no page of the reference"


def defects(site: Path) -> Iterator[str]:
    """Find requests to other hosts, and links that were not resolved.

    Args:
        site: folder of the built site.

    Yields:
        A line for each of them.
    """
    for page in sorted(site.glob("**/*.html")):
        text = page.read_text("utf-8")
        for request in LOADED.findall(text):
            yield f"{page.relative_to(site)} loads {request}"
        prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", text, flags=re.DOTALL)
        if UNRESOLVED.search(prose):
            yield f"{page.relative_to(site)} has a link that was not resolved: ']['"
    for style in sorted(site.glob("**/*.css")):
        for request in LOADED_BY_STYLE.findall(style.read_text("utf-8")):
            yield f"{style.relative_to(site)} loads {request}"


if __name__ == "__main__":
    main()
