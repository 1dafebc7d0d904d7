"""Mistakes of the user, which are reported in one line, and bugs, which keep their traceback."""

from collections.abc import Iterator, Sequence
from dis import opmap
from traceback import walk_tb
from types import CodeType

__all__ = ["MAXIMUM_LENGTH", "is_mistake", "is_out_of_memory", "one_line", "passes_through"]

MAXIMUM_LENGTH = 300
"""Longest message of an error in characters."""
END = 120
"""Number of characters kept from the end of a longer message, where the remedy stands."""


def is_mistake(error: BaseException, modules: Sequence[str]) -> bool:
    """Whether an error reports a mistake of the user: a wrong setting, file or memory size.

    It is a ValueError or a TypeError that a `raise` statement of diffcore raised, an error of the
    operating system, or one of the device's memory. An error that the interpreter, another library
    or the user's own code raised is a bug. So is one that passed through the user's own code,
    whose author needs the place.

    Args:
        error: error that was caught.
        modules: import names of the user's own modules.

    Returns:
        True for a mistake, False for a bug.
    """
    if passes_through(error, modules):
        return False
    if isinstance(error, OSError):
        return error.errno is not None
    if is_out_of_memory(error):
        return True
    return isinstance(error, (ValueError, TypeError)) and _is_raised_by_diffcore(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has too little memory.

    Args:
        error: error that was caught.

    Returns:
        True for torch.OutOfMemoryError, MemoryError, and the RuntimeError of torch's CPU allocator.
    """
    # torch is not imported for the name of a class.
    names = ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
    return type(error).__name__ in names or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def passes_through(error: BaseException, modules: Sequence[str]) -> bool:
    """Whether an error, or one that caused it, was raised below a function of these modules.

    Args:
        error: error that was caught.
        modules: import names, which stand for the modules below them too.

    Returns:
        True if there is such a function in a traceback.
    """
    return any(
        name == module or name.startswith(f"{module}.")
        for cause in _causes(error)
        for frame, _ in walk_tb(cause.__traceback__)
        for name in [str(frame.f_globals.get("__name__", ""))]
        for module in modules
    )


def one_line(text: str) -> str:
    """A message in one line of at most `MAXIMUM_LENGTH` characters.

    Args:
        text: message, perhaps on several lines.

    Returns:
        The message; of a longer one, the beginning and the end.
    """
    line = " ".join(text.split())
    if len(line) <= MAXIMUM_LENGTH:
        return line
    return f"{line[: MAXIMUM_LENGTH - END - 3]} … {line[-END:]}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_raised_by_diffcore(error: BaseException) -> bool:
    """Whether the innermost frame is one of diffcore, and stands at a `raise` statement."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    frame = traceback.tb_frame
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] == "diffcore" and _raises(frame.f_code, traceback.tb_lasti)


def _raises(code: CodeType, offset: int) -> bool:
    return code.co_code[offset] == opmap["RAISE_VARARGS"]
