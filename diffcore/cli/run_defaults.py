"""Commands whose first argument is a run, which brings the defaults of their options."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcore.cli.arguments import wants_help
from diffcore.cli.calls import spell_calls
from diffcore.io.parser import ComponentParser

__all__ = ["parse_with_run_defaults"]

OPTIONS = {
    "sampler": "sampler",
    "grid": "grid",
    "sample_steps": "steps",
    "guidance": "guidance",
    "picture": "picture",
}
"""Setting of a run -> option of the command."""


def parse_with_run_defaults(
    parser: ComponentParser,
    argv: Sequence[str],
    read_settings: Callable[[Path], Mapping[str, Any]],
) -> dict[str, Any]:
    """Parse the arguments of a command whose first argument is the folder of a run.

    Args:
        parser: parser with the positional argument `run` and those options of `OPTIONS` that the
            command has.
        argv: command-line words; components may be spelled as calls, such as CFG(2).
        read_settings: function that returns the settings of the run in a folder.

    Returns:
        The arguments by name, as components.

    Raises:
        ValueError: the folder does not come first, so that its settings are unknown, or it is not a
            run's.
    """
    if argv and not argv[0].startswith("-"):
        settings, known = read_settings(Path(argv[0])), parser.get_defaults()
        parser.set_defaults(
            {
                option: settings[name]
                for name, option in OPTIONS.items()
                if name in settings and option in known
            }
        )
    elif not wants_help(argv):
        raise ValueError(f"the run's folder comes first: {parser.usage}")
    return parser.instantiate(parser.parse_args(spell_calls(argv))).as_dict()
