"""The language of the code: docstrings that state arguments, shapes and results, in plain technical
English.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import diffcore

ROOT = Path(__file__).parents[1]
PREPOSITIONS = (
    "of|for|from|in|on|with|to|by|at|as|under|over|between|within|beside|likewise|that|which"
)
SAYING = re.compile(r"\b(asks?|asked|told|says?|said)\b", re.IGNORECASE)
SHAPE = re.compile(r"\([A-Z][\w, *.+]*,?\)|\bscalar\b|\bshape\b|\bnumber\b|\bTrue\b|\bWhether\b")


class Documented(NamedTuple):
    """A public function, method or class with its own or inherited docstring."""

    name: str
    value: Callable
    parameters: list[str]
    doc: str


def modules() -> Iterator[str]:
    """The public modules of the package."""
    for found in pkgutil.walk_packages(diffcore.__path__, "diffcore."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield found.name


def public() -> Iterator[Documented]:
    """Every public callable of every public module, once, where it is defined."""
    for name in modules():
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isclass(value):
                yield documented(f"{name}.{attribute}", value)
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield documented(
                            f"{name}.{attribute}.{method}",
                            function,
                            inspect.getdoc(getattr(value, method)),
                        )
            elif inspect.isfunction(value):
                yield documented(f"{name}.{attribute}", value)


def documented(name: str, value: Callable, doc: str | None = None) -> Documented:
    try:
        parameters = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]
    except ValueError:
        parameters = []
    return Documented(name, value, parameters, doc or inspect.getdoc(value) or "")


def without_arguments() -> list[str]:
    return [d.name for d in public() if len(d.parameters) >= 3 and "Args:" not in d.doc]


def without_result() -> list[str]:
    return [d.name for d in public() if returns(d) and not states_result(d.doc)]


def returns(found: Documented) -> bool:
    """Whether it is a function that returns a value."""
    if inspect.isclass(found.value):
        return False
    annotation = found.value.__annotations__.get("return", "None")
    return annotation not in (None, "None", "NoReturn")


def states_result(doc: str) -> bool:
    return bool(
        re.search(r"^(Returns|Yields):", doc, re.MULTILINE) or SHAPE.search(doc.split("\n\n")[0])
    )


def entries() -> Iterator[str]:
    """The first line of every entry of every `Args:` section of the sources, as file:line name:
    text.
    """
    for path in sources("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node) or ""
                section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
                for entry in re.findall(
                    r"^ {4}(\*{0,2}\w+: .*)", section[1] if section else "", re.MULTILINE
                ):
                    yield f"{path.relative_to(ROOT)}: {entry}"


def sources(pattern: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        path
        for name in listed.splitlines()
        if (path := ROOT / name).is_file() and not path.is_symlink()
    ]


def prepositions() -> list[str]:
    return [entry for entry in entries() if re.search(rf": \w+: ({PREPOSITIONS})\b", entry)]


def coverage(lacking: list[str], total: int) -> float:
    """The share of documented callables."""
    return 1 - len(lacking) / total


def test_public_callables_of_three_parameters_document_their_arguments():
    total = sum(len(found.parameters) >= 3 for found in public())
    assert coverage(without_arguments(), total) >= 0.98, without_arguments()


def test_public_functions_state_their_result():
    total = sum(returns(found) for found in public())
    assert coverage(without_result(), total) >= 0.97, without_result()


def test_no_argument_is_described_by_a_dangling_preposition():
    assert prepositions() == []


def test_nothing_is_asked_or_told():
    """At most 40 lines, which quote interfaces of other libraries."""
    assert len(sayings()) <= 40, sayings()


def test_no_test_name_is_a_code():
    names = re.compile(r"^def (test_[A-Za-z]\d+_\w*)", re.MULTILINE)
    assert [
        name for path in sources("tests/*.py") for name in names.findall(path.read_text())
    ] == []


def test_folders_of_the_package_hold_at_most_fourteen_modules():
    """Apart from the commands, which are one module each."""
    counts = Counter(
        str(path.parent.relative_to(ROOT))
        for path in sources("*.py")
        if "tests" not in path.parts and path.name != "__init__.py"
    )
    del counts["diffcore/cli/commands"]
    assert {name: count for name, count in counts.items() if count > 14} == {}
    assert counts["diffcore"] <= 4


def test_modules_are_at_most_four_hundred_lines_and_functions_at_most_sixty():
    long = [
        str(path.relative_to(ROOT))
        for path in sources("*.py")
        if "tests" not in path.parts and len(path.read_text().splitlines()) > 420
    ]
    assert long == []
    assert [name for path in sources("*.py") for name in long_functions(path)] == []


def long_functions(path: Path) -> list[str]:
    """Functions of more than sixty lines, their docstrings and signatures left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            if (body[-1].end_lineno or 0) - body[0].lineno + 1 > 60:
                found.append(f"{path.relative_to(ROOT)}:{node.name}")
    return found


def sayings() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources("*.py")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SAYING.search(line)
    ]
