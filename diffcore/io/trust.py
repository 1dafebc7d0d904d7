"""What settings in a file or on a command line may name: a closed list of classes.

These are the components of diffcore, networks of diffusers and torch.nn, data sets of torch, and
optimizers of torch, bitsandbytes, torchao and schedulefree. A field that expects a function or a
network that is already built accepts none of them: such values come from Python. Modules that the
user trusts by name extend both rules.

The rules are enforced where jsonargparse imports what a value names, before anything is built, so
that they hold for every field of every class.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import isclass
from pathlib import Path
from typing import Any

import typeshed_client
from jsonargparse import Namespace, set_parsing_settings
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from diffcore.io.deferred_packages import defer_packages
from diffcore.io.extras import has_extra, missing
from diffcore.io.network_size import BoundedFactory

__all__ = ["trust", "trusted_modules"]

_actions, _common, _stubs_resolver, _typehints, _util = (
    import_module(f"jsonargparse._{name}")
    for name in ("actions", "common", "stubs_resolver", "typehints", "util")
)

LIBRARIES: dict[str, tuple[type, ...]] = {
    "bitsandbytes.optim": (Optimizer,),
    "diffcore": (object,),
    "diffusers.models": (nn.Module,),
    "schedulefree": (Optimizer,),
    "torch.nn.modules": (nn.Module,),
    "torch.optim": (Optimizer,),
    "torch.utils.data.dataset": (Dataset,),
    "torchao.optim": (Optimizer,),
}
"""Module in which a class is defined -> bases of which it must be a subclass."""
OPTIMIZERS = ("bitsandbytes", "schedulefree", "torchao")
"""Optional packages of optimizers in `LIBRARIES`."""
SHORT_PATHS = ("diffusers", "torch.nn", "torch.optim", "torch.utils.data")
"""Modules that show classes of `LIBRARIES` under a shorter path."""


IN_PYTHON = "load it inside `with diffcore.io.trust.trust('{}'):`"
"""How a Python program trusts a module."""

_modules: ContextVar[tuple[str, ...]] = ContextVar("modules", default=())
_remedy: ContextVar[str] = ContextVar("remedy", default=IN_PYTHON)


@contextmanager
def trust(*modules: str, remedy: str = IN_PYTHON) -> Iterator[None]:
    """Let settings name classes and functions of these modules until the `with` block ends.

    Args:
        *modules: import names, also of modules in the current folder.
        remedy: what error messages recommend for a module that is not trusted, with "{}" for its
            name.

    Yields:
        Nothing.

    Raises:
        ValueError: a name is that of a file, or no module has it.

    Example:
        >>> from diffcore.io.specs import from_spec
        >>> with trust("fractions"):
        ...     pass
    """
    path = list(sys.path)
    if modules:
        sys.path.append(os.getcwd())  # not "", for jsonargparse changes the current folder
    tokens = _modules.set((*_modules.get(), *modules)), _remedy.set(remedy)
    try:
        for module in modules:
            _check_module(module)
        yield
    finally:
        _modules.reset(tokens[0])
        _remedy.reset(tokens[1])
        sys.path[:] = path


def trusted_modules() -> tuple[str, ...]:
    """The import names of the modules that the user trusts here.

    Returns:
        The names that surrounding `trust` blocks received.
    """
    return _modules.get()


def _check_module(name: str) -> None:
    """Raise ValueError if no module has this name."""
    stem = name.removesuffix(".py").replace("/", ".").strip(".")
    if stem != name:
        raise ValueError(
            f"{name!r} is the name of a file, expected the import name of a module: trust {stem!r}"
        )
    try:
        found = name in sys.modules or find_spec(name)
    except (ImportError, ValueError):
        found = None
    if not found:
        raise ValueError(
            f"no module is named {name!r}: expected one in the current folder {os.getcwd()} or an "
            "installed one"
        )


def _is_below(path: str, modules: tuple[str, ...]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _import_trusted(path: str, check_path: bool = True) -> Any:
    """The object at an import path, if settings may name it; in place of jsonargparse's function.

    Raises:
        ImportDenied: it is not on the closed list, and its module is not trusted.
    """
    trusted = _modules.get()
    if not check_path or _is_below(path, trusted):
        value = _util.import_object(path, check_path=False)
        if check_path and not callable(value):
            kind = type(value).__name__
            raise ValueError(f"{path} is of type {kind}, expected a class or a function")
        if check_path and not _is_allowed(value) and not _is_defined_below(value, trusted):
            raise _denied(path)
        return value
    if path.rpartition(".")[0] not in SHORT_PATHS and not _is_below(path, tuple(LIBRARIES)):
        if "." not in path:
            raise ValueError(f"Expected a dot import path string: {path}")
        raise _denied(path)
    if (package := path.partition(".")[0]) in OPTIMIZERS and not has_extra(package):
        raise missing(package, f"The optimizer {path}")
    if package == "diffusers":
        defer_packages()
    value = _util.import_object(path, check_path=False)
    if not _is_allowed(value):
        raise _denied(path)
    return value


def _is_allowed(value: Any) -> bool:
    """Whether a value is a class of the closed list."""
    return isclass(value) and any(
        _is_below(value.__module__, (module,)) and issubclass(value, bases)
        for module, bases in LIBRARIES.items()
    )


def _is_defined_below(value: Any, modules: tuple[str, ...]) -> bool:
    paths = _util.canonical_import_paths(value)
    return bool(paths) and all(_is_below(path, modules) for path in paths)


def _denied(path: str) -> Exception:
    denied: Exception = _common.ImportDenied(
        f"importing {path!r} is not allowed, because its module is not trusted: if you trust its "
        f"code, {_remedy.get().format(path.rpartition('.')[0])}"
    )
    return denied


def _adapt_value(value: Any, hint: Any, *args: Any, **kwargs: Any) -> Any:
    """Convert a value to the type of its field; in place of jsonargparse's function.

    Raises:
        ImportDenied: the field expects a function or a built network, and the value names one that
            is not of a trusted module.
    """
    path = _named_path(value)
    if path and not kwargs.get("serialize") and not _is_below(path, _modules.get()):
        if _is_function(hint):
            raise _common.ImportDenied(
                f"a function is given in Python, not in settings, but {path!r} was named: if you "
                f"trust its code, {_remedy.get().format(path.rpartition('.')[0])}"
            )
        if isclass(hint) and (_typehints.is_protocol(hint) or issubclass(hint, nn.Module)):
            raise _common.ImportDenied(f"a network is given in Python, but {path!r} was named")
    result = _ADAPT(value, hint, *args, **kwargs)
    return BoundedFactory(result) if _builds_library_network(result) else result


def _builds_library_network(value: Any) -> bool:
    """Whether a value is jsonargparse's function that builds a network of torch or diffusers."""
    classes = filter(isclass, value.args) if isinstance(value, partial) else ()
    return any(
        issubclass(cls, nn.Module)
        and _is_allowed(cls)
        and not _is_below(cls.__module__, ("diffcore",))
        for cls in classes
    )


def _named_path(value: Any) -> str:
    """The import path that a value names if its field expects a function or a class, or ""."""
    if isinstance(value, _typehints.NestedArg):
        value = value.val if value.key == "class_path" else ""
    if isinstance(value, (Mapping, Namespace)):
        value = value.get("class_path")
    return value if isinstance(value, str) else ""


def _is_function(hint: Any) -> bool:
    """Whether a field expects a function, and not a class whose instances a function returns."""
    origin = _typehints.get_typehint_origin(hint) or hint
    if origin not in _typehints.callable_origin_types:
        return False
    return not _typehints.get_subclass_types(_typehints.get_callable_return_type(hint))


_ADAPT: Callable[..., Any] = _typehints.adapt_typehints
vars(_typehints)["adapt_typehints"] = _adapt_value
vars(_typehints)["import_object"] = vars(_actions)["import_object"] = _import_trusted
set_parsing_settings(import_path_denylist=["*"])  # for what is imported in another way
# By default the search path of type stubs is that of `python -c`, which imports json.py of the
# current folder.
_SEARCH_PATH = [Path(folder) for folder in sys.path if folder]
vars(_stubs_resolver)["stubs_resolver"] = _stubs_resolver.StubsResolver(
    search_context=typeshed_client.get_search_context(search_path=_SEARCH_PATH)
)
