"""Packages of other libraries whose `__init__` runs when a name of it is used, not before.

`diffusers.UNet2DModel` needs one module of `diffusers.models.unets` and one of
`diffusers.models.transformers`. Their `__init__` modules import every network of diffusers, and
with them peft, most of transformers and scipy.stats, a third of the start of a training.
"""

import sys
from importlib.util import find_spec, module_from_spec
from threading import RLock
from typing import Any

__all__ = ["defer_packages"]

PACKAGES = ("diffusers.hooks", "diffusers.models.transformers", "diffusers.models.unets")
"""Packages whose modules import each other by their full names."""

_lock = RLock()


def defer_packages(*names: str) -> None:
    """Import packages without running their `__init__`.

    Modules of the packages can be imported, and the first use of any other name runs `__init__`.

    Args:
        names: import names of packages; by default those of diffusers that cost most. One that is
            imported already, or is not installed, is left alone.

    Example:
        >>> defer_packages("json.tool.missing")
    """
    for name in names or PACKAGES:
        with _lock:
            if name not in sys.modules:
                _defer(name)


def _defer(name: str) -> None:
    parent, _, child = name.rpartition(".")
    try:
        spec = find_spec(name)  # imports the parent
    except ModuleNotFoundError:
        return
    if spec is None or spec.loader is None or not spec.submodule_search_locations:
        return
    module, loader, is_run = module_from_spec(spec), spec.loader, False

    def find_name(attribute: str) -> Any:
        nonlocal is_run
        with _lock:
            # The import system and `inspect` look for names such as __file__ and __wrapped__.
            is_internal = attribute.startswith("__") and attribute != "__all__"
            if is_run or is_internal:
                raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
            is_run = True
            loader.exec_module(module)
        return getattr(module, attribute)

    vars(module)["__getattr__"] = find_name
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], child, module)
