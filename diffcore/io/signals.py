"""Signals that end a program after what it is doing: SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C."""

import signal
import threading
import time
from types import FrameType
from typing import NoReturn, Self

__all__ = ["Interruption", "end_by_signal"]

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
REPEAT_SECONDS = 1.0
"""Time within which a second Ctrl-C is the same one: a launcher passes it on to its processes,
which received it from the terminal already.
"""


class Interruption:
    """Context in which a signal is recorded in place of ending the program.

    Outside of the main thread it records nothing. Signals that the program ignores stay ignored. A
    second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that was received; 0 for none."""
        self._time = 0.0
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (int(getattr(signal, name)) for name in NAMES if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = self.signal == number and time.monotonic() - self._time > REPEAT_SECONDS
        if number == signal.SIGINT and is_second:
            raise KeyboardInterrupt
        if number != self.signal:
            self.signal, self._time = number, time.monotonic()


def end_by_signal(number: int) -> NoReturn:
    """End the program with the status that shells give to a signal, 128 plus its number.

    Args:
        number: number of the signal.

    Raises:
        KeyboardInterrupt: The signal is that of Ctrl-C, whose status is 130.
        SystemExit: The signal is another one.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
