"""The public API changes on purpose: the names of every public module are compared with a
checked-in list.

`python -m tests.test_public_names` rewrites the list.
"""

import importlib
import pkgutil
from pathlib import Path

import pytest

import diffcore

LIST = Path(__file__).with_name("public_names.txt")
COMMANDS = ("diffcore.__main__", "diffcore.cli")


def modules() -> list[str]:
    """The public modules of the package, in alphabetical order; the command line has no API."""
    names = [module.name for module in pkgutil.walk_packages(diffcore.__path__, "diffcore.")]
    return ["diffcore", *sorted(name for name in names if not name.startswith(COMMANDS))]


def public_names() -> list[str]:
    """One line `module.name` for each public name."""
    return [
        f"{module}.{name}"
        for module in modules()
        for name in getattr(importlib.import_module(module), "__all__", ())
    ]


@pytest.mark.parametrize("module", modules())
def test_every_public_module_declares_the_names_that_it_has(module):
    loaded = importlib.import_module(module)
    packages = hasattr(loaded, "__path__")
    assert packages or hasattr(loaded, "__all__"), f"{module} has no __all__"
    names = list(getattr(loaded, "__all__", ()))
    assert [name for name in names if not hasattr(loaded, name)] == []
    assert len(names) == len(set(names))


def test_the_public_names_are_those_of_the_checked_in_list():
    assert public_names() == LIST.read_text().splitlines()


def test_importing_everything_from_diffcore_gives_its_public_names():
    names: dict = {}
    exec("from diffcore import *", names)
    assert set(diffcore.__all__) <= set(names)


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n")
