"""Output in an encoding without Greek letters, such as that of the locale C."""

import codecs
import sys

__all__ = ["spell_what_streams_lack"]

SPELLINGS = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "ε": "eps",
    "η": "eta",
    "λ": "lambda",
    "μ": "mu",
    "ρ": "rho",
    "σ": "sigma",
    "²": "^2",
    "…": "...",
    "±": "+-",
    "∞": "inf",
}


def spell_what_streams_lack() -> None:
    """Let stdout and stderr spell characters that their encoding lacks: λ as lambda, others as ?.

    Streams that cannot be configured, such as those of a test, are left alone.
    """
    codecs.register_error("diffcore.spell", _spell)
    for stream in (sys.stdout, sys.stderr):
        if (configure := getattr(stream, "reconfigure", None)) is not None:
            configure(errors="diffcore.spell")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(character, "?") for character in missing), error.end
