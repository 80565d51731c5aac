"""Ctrl-C, SIGTERM and SIGHUP, caught from the first moment on. Light: it is imported before everything else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignals"]


class StopSignals:
    """The signals as a flag: nothing is ever interrupted half-way, so that nothing is left behind.

    Attributes:
        number: the signal that came, None as long as there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals within."""

        def on_signal(number: int, _frame: FrameType | None) -> None:
            self.number = number

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
