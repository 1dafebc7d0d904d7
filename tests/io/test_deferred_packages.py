"""Packages whose __init__ runs when one of its names is used."""

import sys
from pathlib import Path
from subprocess import run

import pytest

from diffcore.io.deferred_packages import defer_packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `slow` below `outer`, whose __init__ defines a name and a star."""
    folder = tmp_path / "outer_of_test" / "slow"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(
        "from .fast import value\n__all__ = ['value', 'other']\nother = 2\n"
    )
    (folder / "fast.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield "outer_of_test.slow"
    for name in set(sys.modules) - before:
        if name.startswith("outer_of_test"):
            del sys.modules[name]


def test_a_module_is_imported_without_the_package_and_a_name_runs_it(package):
    defer_packages(package)
    from outer_of_test.slow.fast import value

    assert value == 1
    assert "other" not in vars(sys.modules[package])
    from outer_of_test.slow import other

    assert other == 2
    with pytest.raises(AttributeError, match="has no attribute 'none'"):
        sys.modules[package].none
    defer_packages(package)  # it is imported already
    assert sys.modules[package].other == 2


def test_star_imports_run_the_package_and_missing_packages_are_left_alone(package):
    defer_packages(package, "no_such_package.of_test", "json.decoder.none")
    found = {}
    exec(f"from {package} import *", found)
    assert (found["value"], found["other"]) == (1, 2)


@pytest.mark.slow
def test_a_network_of_the_settings_imports_neither_peft_nor_scipy_stats():
    code = """
import sys
from diffcore.io.parser import ComponentParser
from torch import nn
from typing import Callable
parser = ComponentParser(prog="x")
parser.add_argument("--network", type=Callable[[], nn.Module])
parser.parse_args(["--network=diffusers.UNet2DModel"])
print([name for name in ("peft", "scipy.stats") if name in sys.modules])
from diffusers.models.unets import UNet2DModel
from diffusers import UNet2DModel as other
print(UNet2DModel is other)
"""
    root = Path(__file__).parents[2]
    ended = run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert ended.stdout.split("\n")[:2] == ["[]", "True"], ended.stderr
