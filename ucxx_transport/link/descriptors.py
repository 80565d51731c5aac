"""How many connections a process has file descriptors for."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import Final

PER_CONNECTION: Final = 3
"""Descriptors that UCX takes for one over TCP, on each side."""

SPARE: Final = 64
"""Left for everything else that the process opens later."""


def connection_budget(*, limit: int, in_use: int, asked: int | None) -> int:
    """How many connections there may be, at least one.

    Args:
        limit: of the process's descriptors.
        in_use: of these, taken by now.
        asked: the setting's bound, None for none.
    """
    room = max(1, (limit - in_use - SPARE) // PER_CONNECTION)
    return room if asked is None else min(asked, room)


def raised_limit() -> int:
    """The process's limit of descriptors, raised as far as it goes without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # where a sandbox forbids it, the limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def descriptors_in_use() -> int:
    """How many descriptors the process has open."""
    return len(os.listdir("/proc/self/fd"))
