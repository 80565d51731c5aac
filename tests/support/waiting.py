"""The one way a test waits for another process or thread: a readiness poll with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["is_asleep", "wait_until"]

ValueT = TypeVar("ValueT")


def wait_until(predicate: Callable[[], ValueT], deadline_s: float = 60.0, *, what: str = "") -> ValueT:
    """Return the first true value of `predicate`.

    Args:
        predicate: called again and again; must not block.
        deadline_s: how long it may stay false.
        what: names the condition in the failure.

    Raises:
        AssertionError: still false at the deadline; names the condition and the last value.
    """
    end = time.monotonic() + deadline_s
    pause_s = 0.0005
    while not (value := predicate()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what or predicate} (last value: {value!r})")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.02)
    return value


def is_asleep(thread_id: int) -> bool:
    """Whether a thread of this process runs nothing now; `thread_id` is the native one."""
    status = Path(f"/proc/self/task/{thread_id}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "S"
