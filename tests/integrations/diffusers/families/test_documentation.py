"""docs/diffusers.md contains a table of the families, which is made from their records."""

from pathlib import Path

from diffcore.integrations.diffusers.families import FAMILIES

PAGE = Path(__file__).parents[4] / "docs" / "diffusers.md"
HEADER = """\
| family | network | evaluation of guidance | prompts | pipelines for `attach` |
|---|---|---|---|---|
"""


def row(family):
    cells = (
        family.name,
        f"`{family.network}`",
        f"{family.guidance_batching}, `{family.guidance_argument}`" if family.pipelines else "none",
        "yes" if family.has_text else "no",
        ", ".join(f"`{name}`" for name in family.pipelines) or "none",
    )
    return f"| {' | '.join(cells)} |\n"


def test_the_table_of_families_is_that_of_the_records():
    table = HEADER + "".join(map(row, FAMILIES))
    assert table in PAGE.read_text(), f"replace the table of families by\n\n{table}"
