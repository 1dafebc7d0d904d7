"""`diffcore consolidate`: write weights of a run as one safetensors file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffcore.io.files import check_links
from diffcore.io.parser import ComponentParser
from diffcore.io.safetensors import write_weights
from diffcore.run import AVERAGED, Run

__all__ = ["ConsolidationRequest", "main"]


@dataclass(frozen=True)
class ConsolidationRequest:
    """Which weights of a run to write, and where.

    Args:
        weights: averaged, raw (the trained weights in the newest checkpoint), or a checkpoint such
            as step-00000400 or step-00000400/raw.
        out: safetensors file to write; "": WEIGHTS.safetensors in the run's folder.
    """

    weights: str = AVERAGED
    out: str = ""


def main(argv: Sequence[str]) -> None:
    """Write the weights that the words name.

    Args:
        argv: command-line words after `consolidate`.
    """
    parser = ComponentParser(
        prog="diffcore consolidate",
        usage="diffcore consolidate RUN [--option value ...]",
        description="Write weights of the run in folder RUN as one safetensors file, also those of "
        "a checkpoint to which each rank wrote its own part (--checkpoints.format sharded).",
    )
    parser.add_argument("run", type=str, metavar="RUN", help="folder of a run")
    parser.add_class_arguments(ConsolidationRequest)
    settings = parser.parse_args(list(argv)).as_dict()
    run = Run(settings.pop("run"))
    check_links(run.folder)
    request = ConsolidationRequest(**settings)
    if not run.folder.is_dir():
        raise ValueError(f"{run.folder} is no folder of a run")
    name = run.resolve_weights(request.weights)
    out = Path(request.out or run.folder / f"{name.replace('/', '-')}.safetensors")
    _check_out(out, run)
    found = run.read_weights(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {} if found.options is None else {"network": found.options}
    write_weights(out, found.tensors, **options)
    print(f"{found.origin} -> {out}: {len(found.tensors)} tensors")


def _check_out(out: Path, run: Run) -> None:
    """Raise ValueError if the file would replace one of the run's own, or one of another kind."""
    if out.suffix not in ("", ".safetensors"):
        raise ValueError(f"out is {out}, expected a name that ends in .safetensors")
    protected = (run.weights, run.checkpoints, run.pipeline)
    if any(out.resolve().is_relative_to(path.resolve()) for path in protected):
        raise ValueError(f"out is {out}, a file of the run itself: choose another name")
