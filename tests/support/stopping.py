"""SIGSTOP, and its effect awaited."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.support.waiting import wait_until

__all__ = ["stop_process"]

STOPPED = frozenset("TtZX")
"""States of threads that run no more: stopped, traced, dead (proc(5), /proc/PID/stat)."""


def stop_process(pid: int) -> None:
    """Send SIGSTOP, and wait until no thread of the process runs any more.

    The signal is delivered to one thread, which stops the others: on a busy machine these go on for tens of
    milliseconds, long enough to answer a peer.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: states_of_threads(pid) <= STOPPED, 60, what=f"every thread of {pid} has stopped")


def states_of_threads(pid: int) -> set[str]:
    states = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            states.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return states
