"""The command line and the Python code that draw the samples of the playground again."""

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path

from diffcore.cli.commands.playground.drawing import Drawing
from diffcore.cli.run_defaults import CLASSES
from diffcore.io import specs

__all__ = ["command_line", "python_code"]

PACKAGES = ("guidance", "samplers", "schedules")
"""Packages of the components that code imports, in the order of the import statements."""
TEMPLATE = """\
{imports}

denoiser = {denoiser}
samples = sample(
    denoiser,
    {sampler},
    {grid},
    {steps},
    seeds=range({first}, {end}),
    condition={condition},
    guidance={guidance},
    batch_size={batch_size},
)
{decoded}
print(x.shape, samples.evaluations)
"""


def command_line(drawing: Drawing, out: str = "samples") -> str:
    """The command that writes the same samples as arrays, and as a picture.

    Args:
        drawing: samples with their settings.
        out: path of the files, without suffix.

    Returns:
        One line for a POSIX shell.
    """
    request, seeds = drawing.request, drawing.request.seeds
    options = {
        "--sampler": _describe_call(request.sampler),
        "--grid": _describe_call(request.grid),
        "--steps": str(request.steps),
        "--guidance": _describe_call(request.guidance),
    }
    if request.labels or drawing.model.oracle is not None:  # which has labels by default
        options["--labels"] = str(request.labels) or "[]"
    options["--per-label"] = str(request.per_label)
    words = [word for pair in options.items() for word in pair]
    words += [f"--prompt={prompt}" for prompt in request.prompt]
    if drawing.model.oracle is not None:
        words += ["--schedule", _describe_call(request.schedule), "--seed", str(request.seed)]
        command = ["diffcore", "playground", drawing.model.name, *words, "--out", f"{out}.npz"]
        return shlex.join(command)
    words += ["--seeds", f"{seeds[0]}-{seeds[-1]}", "--batch-size", str(drawing.batch_size)]
    words += ["--out", f"{out}.png", "--arrays", f"{out}.npz"]
    return shlex.join(["diffcore", "sample", drawing.model.name, *words])


def python_code(drawing: Drawing) -> str:
    """Python code that draws the same samples, as `x`.

    Args:
        drawing: samples with their settings.

    Returns:
        Lines of code.
    """
    request = drawing.request
    statements, denoiser, decoded = _denoiser_code(drawing)
    components = {
        "sampler": _describe_call(request.sampler),
        "grid": _describe_call(request.grid),
        "guidance": _describe_call(request.guidance),
    }
    texts = list(components.values())
    if drawing.model.oracle is not None:
        texts.append(_describe_call(request.schedule))
    statements = [*_imports(texts), *statements]
    return TEMPLATE.format(
        imports="\n".join(sorted(statements, key=_import_order)),
        denoiser=denoiser,
        decoded=decoded,
        steps=request.steps,
        first=request.seeds.start,
        end=request.seeds.stop,
        condition=_condition_code(drawing),
        batch_size=drawing.batch_size,
        **components,
    )


def _describe_call(component: object) -> str:
    """The constructor call of a component, with double quotes, which a shell word may contain."""
    text = specs.describe_component(component)
    return text if '"' in text else text.replace("'", '"')


def _denoiser_code(drawing: Drawing) -> tuple[list[str], str, str]:
    """Import statements, the expression of the denoiser, and the statement that sets x."""
    model, prompts = drawing.model, drawing.request.prompt
    if model.oracle is not None:
        return (
            ["from diffcore import sample", "from diffcore.core.oracle import plane_distribution"],
            f"plane_distribution({model.name!r}, {_describe_call(drawing.request.schedule)})",
            "x = samples.x",
        )
    if model.network is None or (model.network.latents is None and not prompts):
        statements = ["from diffcore import Run, sample"]
        if (Path(model.name) / "process.json").is_file():
            return statements, f"Run({model.name!r}).denoiser()", "x = samples.x"
    return (
        [
            "import torch",
            "from pathlib import Path",
            "from diffcore import sample",
            "from diffcore.cli.image_model import PipelineOptions, load_image_model",
        ],
        f"(model := load_image_model(Path({model.name!r}), PipelineOptions(prompt={prompts!r}), "
        f'torch.device("{model.denoiser.device}"))).denoiser',
        "x = model.decode(samples.x)",
    )


def _condition_code(drawing: Drawing) -> str:
    """[0] * 3 + [2] * 3, or None."""
    request = drawing.request
    labels = range(len(request.prompt)) if request.prompt else request.labels
    return " + ".join(f"[{label}] * {request.per_label}" for label in labels) or "None"


def _imports(texts: list[str]) -> Iterator[str]:
    """The statements that import the classes, and inf, which the expressions contain."""
    nodes = [node for text in texts for node in ast.walk(ast.parse(text, mode="eval"))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    if "inf" in names:
        yield "from math import inf"
    for package in PACKAGES:
        found = sorted(
            name
            for name in names & CLASSES.keys()
            if CLASSES[name].__module__.startswith(f"diffcore.{package}.")
        )
        if found:
            yield f"from diffcore.{package} import {', '.join(found)}"


def _import_order(statement: str) -> tuple[bool, str]:
    """The standard library and torch first, then diffcore."""
    return "diffcore" in statement, statement
