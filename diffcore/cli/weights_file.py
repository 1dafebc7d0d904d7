"""Commands that write weights of a run as one safetensors file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from diffcore.io.files import check_links
from diffcore.io.parser import ComponentParser
from diffcore.run import Run

__all__ = ["choose_weights_file", "parse_run_request"]

Request = TypeVar("Request")


def parse_run_request(
    parser: ComponentParser, argv: Sequence[str], request: type[Request]
) -> tuple[Run, Request]:
    """Parse the arguments of a command whose first argument is the folder of a run.

    Args:
        parser: parser of the command, without arguments yet.
        argv: command-line words.
        request: class whose arguments are the options of the command.

    Returns:
        The run and the request.

    Raises:
        ValueError: a link leads out of the folder, or the request refuses an option.
    """
    parser.add_argument("run", type=str, metavar="RUN", help="folder of a run")
    parser.add_class_arguments(request)
    settings = parser.parse_args(list(argv)).as_dict()
    run = Run(settings.pop("run"))
    check_links(run.folder)
    return run, request(**settings)


def choose_weights_file(run: Run, out: str, default: str) -> Path:
    """The file to which a command writes weights of a run.

    Args:
        run: folder of the run.
        out: path of the file; "": `default` in the run's folder.
        default: name of the file without `out`.

    Returns:
        The path.

    Raises:
        ValueError: the file would replace one of the run's own, or one of another kind.
    """
    path = Path(out or run.folder / default)
    if path.suffix not in ("", ".safetensors"):
        raise ValueError(f"out is {path}, expected a name that ends in .safetensors")
    protected = (run.weights, run.checkpoints, run.pipeline, run.snapshots)
    if any(path.resolve().is_relative_to(own.resolve()) for own in protected):
        raise ValueError(f"out is {path}, a file of the run itself: choose another name")
    return path
