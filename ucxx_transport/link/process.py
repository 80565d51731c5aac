"""What a process has of its links: file descriptors, and what outlives a link.

- A link that is never closed stays until the interpreter ends, and is closed then: an operation in flight whose buffer
  the interpreter frees first would be a crash. One whose last thread still runs then (a daemon's) is left as it is.
- UCX does not survive a fork. In the child, a link of the parent is kept for good, so that nothing closes the parent's
  connections.
- The buffer of an operation that never ends is kept for good, too: UCX may still write to it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import threading
from contextlib import suppress
from typing import Any, Final

from ucxx_transport.errors import BusyError, ConfigError
from ucxx_transport.link.base import FORKED

PER_CONNECTION: Final = 3  # descriptors that UCX takes for one over TCP, on each side
SPARE: Final = 64  # left for everything else that the process opens later
RESERVE: Final = 3 * PER_CONNECTION
"""What is free before UCX is asked for a connection: where it runs out in the middle of one, it may end the process."""


def connection_budget(*, limit: int, in_use: int, asked: int | None) -> int:
    """How many connections there may be, at least one: of a limit of descriptors, and the setting's bound."""
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
    """How many descriptors the process has open; the limit where there is not even one for this look."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def shortage(begun: int) -> BusyError | None:
    """Why there can be none beside so many connections that have not taken all their descriptors yet; None: it can."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = descriptors_in_use()
    if limit == resource.RLIM_INFINITY or limit - in_use >= RESERVE + begun * PER_CONNECTION:
        return None
    words = "this process has no file descriptors for another connection; close some, or raise its limit (ulimit -n)"
    return BusyError(words, in_use=in_use, limit=limit)


open_links: Final[set[Any]] = set()  # of UCXXLink, each kept until it is closed
_pids_that_used_ucx: set[int] = set()


def check_not_forked() -> None:
    """Refuse to use UCX in a fork of a process that has used it, with a ConfigError."""
    if _pids_that_used_ucx - {os.getpid()}:
        raise ConfigError(FORKED)


def note_use(link: Any) -> None:
    """This process has a link from now on."""
    _pids_that_used_ucx.add(os.getpid())
    open_links.add(link)


def keep_for_good(*things: object) -> None:
    """Never free these, not even at the interpreter's end: UCX may still use them."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@atexit.register
def _close_all() -> None:
    running = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    for link in list(open_links):
        if link.forked or link.thread in running:
            keep_for_good(link)
        else:
            link.close()
