"""A clock that a test moves."""

from __future__ import annotations

import threading

__all__ = ["Clock"]


class Clock:
    """Seconds that pass when a test has them pass.

    Attributes:
        now_s: what it shows.
        asked_by: the thread of each look at it, in order: a test waits until one has looked.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.asked_by: list[threading.Thread] = []

    def __call__(self) -> float:
        self.asked_by.append(threading.current_thread())
        return self.now_s
