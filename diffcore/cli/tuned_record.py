"""The record of `diffcore tune`: the sampler and the grid of some steps and a guidance rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore.cli.evaluation.record import default_out, weights_facts, write_record
from diffcore.cli.run_defaults import parse_with_run_defaults
from diffcore.guidance import Guidance
from diffcore.io.parser import ComponentParser
from diffcore.io.plain_data import hash_data, read_json
from diffcore.io.specs import from_spec, to_spec
from diffcore.run import AVERAGED
from diffcore.samplers import Sampler, TunedMultistep
from diffcore.schedules import Grid

__all__ = ["TunedRecord", "find_record", "parse_with_tuned_defaults", "record_path", "save_record"]

RECORD, FACTS = "record", "facts"
"""Entries of the file: the fields of the record, and how they were found."""


@dataclass(frozen=True)
class TunedRecord:
    """A sampler and a grid that were found for a network, a number of steps and a guidance rule.

    Args:
        sampler: numerical integrator.
        grid: rule that places the knots.
        steps: number of steps.
        evaluations: number of evaluations of the guided network.
        guidance: guidance rule.
        is_tuned: whether the knots, and the coefficients of the sampler, are tuned; False: untuned
            ones were closer on held-out samples.
        weights: hash of the weights that they were found for; "" for a pipeline.
    """

    sampler: Sampler
    grid: Grid
    steps: int
    evaluations: int
    guidance: Guidance
    is_tuned: bool
    weights: str = ""

    @property
    def description(self) -> str:
        """What a command that uses the record prints of it."""
        if not self.is_tuned:
            what = "closest untuned knots"
        elif isinstance(self.sampler, TunedMultistep):
            what = "tuned knots and coefficients"
        else:
            what = "tuned knots"
        return f"{what} for {self.evaluations} evaluations"


def record_path(folder: Path, steps: int, guidance: Guidance) -> Path:
    """The file of a record, in the folder of a run or beside a pipeline.

    Args:
        folder: folder of the run or of the pipeline.
        steps: number of steps.
        guidance: guidance rule, as it is spelled in settings.

    Returns:
        The path, which need not exist.
    """
    name = f"{steps}-{type(guidance).__name__}-{hash_data(to_spec(guidance))[:8]}.json"
    return default_out(folder, "tuned") / name


def save_record(folder: Path, record: TunedRecord, facts: Mapping[str, Any]) -> Path:
    """Write a record.

    Args:
        folder: folder of the run or of the pipeline.
        record: what was found.
        facts: how it was found, plain data.

    Returns:
        Path of the file.
    """
    path = record_path(folder, record.steps, record.guidance)
    write_record(path, {RECORD: to_spec(record), FACTS: dict(facts)})
    return path


def find_record(folder: Path, steps: int, guidance: Guidance) -> TunedRecord | None:
    """Read the record of some steps and a guidance rule.

    Args:
        folder: folder of the run or of the pipeline.
        steps: number of steps.
        guidance: guidance rule, as it is spelled in settings.

    Returns:
        The record; None if there is none.

    Raises:
        ValueError: its file is damaged.
    """
    path = record_path(folder, steps, guidance)
    if not path.is_file():
        return None
    try:
        return from_spec(TunedRecord, read_json(path).get(RECORD, {}))
    except ValueError as error:
        raise ValueError(
            f"{path} is no record of diffcore tune ({error}): delete it, or tune again"
        ) from None


def parse_with_tuned_defaults(
    parser: ComponentParser,
    words: Sequence[str],
    read_settings: Callable[[Path], Mapping[str, Any]],
) -> tuple[dict[str, Any], str]:
    """Parse as `parse_with_run_defaults`; a record for the steps, the guidance and the weights
    gives the defaults of sampler and grid.

    Args:
        parser: parser with the options sampler, grid, steps, guidance and weights.
        words: command-line words.
        read_settings: function that returns the settings of the run in a folder.

    Returns:
        The arguments by name, and a line for the user about the record, or "".
    """
    arguments = parse_with_run_defaults(parser, words, read_settings)
    folder, steps, guidance = (
        Path(arguments["run"]),
        arguments["steps"],
        arguments["guidance"],
    )
    is_usual = (
        arguments["weights"] == AVERAGED
        and arguments.get("image") is None  # which needs a grid between other bounds
        and arguments.get("format") != "diffusers"  # whose schedulers have grids of their own
    )
    record = find_record(folder, steps, guidance) if is_usual else None
    if record is None:
        return arguments, ""
    path = record_path(folder, steps, guidance)
    if record.weights != weights_facts(folder, AVERAGED).get("weights", ""):
        return arguments, f"{path} is of other weights and not used: tune again, or delete it"
    found = {"sampler": to_spec(record.sampler), "grid": to_spec(record.grid)}
    again = parse_with_run_defaults(parser, words, lambda path: {**read_settings(path), **found})
    if (again["sampler"], again["grid"]) != (record.sampler, record.grid):
        return arguments, ""  # the user names one of them
    return again, f"{record.description}, of {path} (--sampler or --grid replace them)"
