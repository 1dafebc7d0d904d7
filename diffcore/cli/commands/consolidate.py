"""`diffcore consolidate`: write weights of a run as one safetensors file."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffcore.cli.weights_file import choose_weights_file, parse_run_request
from diffcore.io.parser import ComponentParser
from diffcore.io.safetensors import write_weights
from diffcore.run import AVERAGED

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
    run, request = parse_run_request(parser, argv, ConsolidationRequest)
    if not run.folder.is_dir():
        raise ValueError(f"{run.folder} is no folder of a run")
    name = run.resolve_weights(request.weights)
    out = choose_weights_file(run, request.out, f"{name.replace('/', '-')}.safetensors")
    found = run.read_weights(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {} if found.options is None else {"network": found.options}
    write_weights(out, found.tensors, **options)
    print(f"{found.origin} -> {out}: {len(found.tensors)} tensors")
