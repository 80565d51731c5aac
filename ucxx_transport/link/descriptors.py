"""How many connections a process has file descriptors for."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import Final

from ucxx_transport.errors import BusyError

PER_CONNECTION: Final = 3
"""Descriptors that UCX takes for one over TCP, on each side."""

SPARE: Final = 64
"""Left for everything else that the process opens later."""


RESERVE: Final = 3 * PER_CONNECTION
"""What is free before UCX is asked for a connection: where it runs out in the middle of one, it may end the process."""


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


def shortage(begun: int) -> BusyError | None:
    """Why there can be no further connection now; None where there can.

    Args:
        begun: connections that have not taken all of their descriptors yet.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        in_use = descriptors_in_use()
    except OSError:  # not even for this look
        in_use = limit
    if limit == resource.RLIM_INFINITY or limit - in_use >= RESERVE + begun * PER_CONNECTION:
        return None
    words = "this process has no file descriptors for another connection; close some, or raise its limit (ulimit -n)"
    return BusyError(words, in_use=in_use, limit=limit)
