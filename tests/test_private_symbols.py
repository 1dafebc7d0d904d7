"""Private symbols of other packages: each still exists, and pyproject.toml bounds its package."""

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYMBOLS = [
    # (dotted path, module that uses it, upper bound in pyproject.toml)
    (
        "jsonargparse._typehints.discard_init_args_on_class_path_change",
        "diffcore/io/parser.py",
        "jsonargparse<4.54",
    ),
    (
        "jsonargparse.DefaultHelpFormatter._expand_help",
        "diffcore/io/parser.py",
        "jsonargparse<4.54",
    ),
]


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    return [*project["dependencies"], *(item for extra in optional for item in extra)]


@pytest.mark.parametrize(("path", "user", "bound"), SYMBOLS, ids=[path for path, *_ in SYMBOLS])
def test_a_private_symbol_exists_and_its_package_is_bounded(path, user, bound):
    assert pkgutil.resolve_name(path) is not None
    assert path.rpartition(".")[2] in (ROOT / user).read_text()
    package, version = re.fullmatch(r"([\w-]+)(<[\d.]+)", bound).groups()
    found = [text for text in requirements() if re.match(rf"{package}\b", text)]
    assert found
    assert all(text.endswith(version) for text in found)
