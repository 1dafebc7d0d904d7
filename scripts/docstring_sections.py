"""Extension of griffe for the reference: `Example:` of docstrings becomes a block of code.

griffe knows the section of doctests as `Examples:`; under another name they would be prose.
"""

import re
from typing import Any

import griffe

__all__ = ["ExampleSections"]


class ExampleSections(griffe.Extension):
    """Renames the section `Example:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one docstring.

        Args:
            obj: object of the package.
        """
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
