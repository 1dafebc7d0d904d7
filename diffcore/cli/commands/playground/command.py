"""`diffcore playground`: samplers and guidance in the browser, on exact or learned denoisers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcore.cli.arguments import join_option, wants_help
from diffcore.cli.commands.playground.controls import Controls
from diffcore.cli.commands.playground.drawing import draw
from diffcore.cli.commands.playground.page import Address, serve
from diffcore.cli.commands.playground.request import PictureRequest, default_request
from diffcore.cli.commands.sample import find_device
from diffcore.cli.run_defaults import spell_calls
from diffcore.core.oracle import PLANE_NAMES
from diffcore.io.parser import ComponentParser
from diffcore.sampling.files import ARRAY_SUFFIXES, SampleKey, write_arrays

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Serve the page, or write the samples of its first picture.

    Args:
        argv: command-line words after `playground`.
    """
    parser = _parser()
    words = join_option(argv, "prompt", "a text", may_be_empty=True)
    models = _first_words(words) or [PLANE_NAMES[0]]
    if not wants_help(words):
        parser.set_defaults(default_request(models[0]))
    arguments = parser.instantiate(parser.parse_args(spell_calls(words))).as_dict()
    _run(models, arguments)


def _parser() -> ComponentParser:
    """The parser of the command."""
    parser = ComponentParser(
        prog="diffcore playground",
        usage="diffcore playground [MODEL ...] [--option value ...]",
        description="Show in the browser how schedule, sampler, grid, steps and guidance act on an "
        f"exact distribution ({', '.join(PLANE_NAMES)}), on a run or on a diffusers pipeline: "
        "knots, trajectories, samples, the number of network evaluations, and the command line and "
        "Python code that repeat them. The options below are those of the first picture.",
    )
    parser.add_argument(
        "models",
        type=str,
        nargs="*",
        default=[],
        metavar="MODEL",
        help="name of a distribution, or folder of a run or of a diffusers pipeline; the page "
        "offers all distributions and these folders",
    )
    parser.add_class_arguments(PictureRequest)
    parser.add_class_arguments(Address)
    parser.add_argument(
        "--out",
        type=str,
        default="",
        help=f"file ({', '.join(ARRAY_SUFFIXES)}) to write the samples of the first picture to, in "
        "place of a page",
    )
    parser.add_argument("--device", type=str, default="auto", help="device: auto, cpu, cuda, ...")
    return parser


def _run(models: Sequence[str], arguments: dict[str, Any]) -> None:
    address = Address(**{name: arguments.pop(name) for name in Address.__dataclass_fields__})
    out, device = arguments.pop("out"), find_device(arguments.pop("device"))
    del arguments["models"]
    request = PictureRequest(**arguments)
    if out:
        _write(models[0], request, Path(out), device)
        return
    offered = list(dict.fromkeys([*models, *PLANE_NAMES]))
    serve(offered, Controls.of(models[0], request), device, address)


def _write(model: str, request: PictureRequest, out: Path, device: Any) -> None:
    """Write the samples as arrays."""
    if out.suffix not in ARRAY_SUFFIXES:
        raise ValueError(f"out is {out}, expected a file of suffix {', '.join(ARRAY_SUFFIXES)}")
    drawing = draw(model, request, device)
    null_label = drawing.model.denoiser.process.classes
    labels = request.condition or [null_label] * request.count
    keys = [SampleKey(label, seed) for label, seed in zip(labels, request.seeds, strict=True)]
    write_arrays(out, keys, drawing.model.decode(drawing.samples.x))
    print(f"{len(keys)} samples of {drawing.samples.evaluations:g} evaluations each -> {out}")


def _first_words(words: Sequence[str]) -> list[str]:
    """The words before the first option: the models."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:count])
