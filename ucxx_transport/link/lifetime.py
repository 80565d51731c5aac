"""What outlives a link: clean-up at the end of the interpreter, forked children, leaked buffers.

- A link that is never closed stays until the interpreter ends, and is closed then: an operation in flight whose buffer
  the interpreter frees first would be a crash. A link whose thread still runs then (a daemon's) is left as it is.
- UCX does not survive a fork. In the child, what the parent had is never freed, so that nothing closes the parent's
  connections, and every use is an error that says so.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from ucxx_transport.link.driver import ProgressDriver
    from ucxx_transport.link.pending import Operation

DRAIN_TIMEOUT_S = 1.0


class RegisteredLink(Protocol):
    """A link, as far as it is closed or disowned from here."""

    thread: int

    def close_now(self) -> None: ...
    def disown(self) -> None: ...


_links: set[RegisteredLink] = set()
_leaked: list[object] = []
_pids_that_used_ucx: set[int] = set()


def register(link: RegisteredLink) -> None:
    """A link was opened in this process."""
    _pids_that_used_ucx.add(os.getpid())
    _links.add(link)


def unregister(link: RegisteredLink) -> None:
    """A link was closed."""
    _links.discard(link)


def leak(*things: object) -> None:
    """Keep what UCX may still write to, for the life of the process."""
    _leaked.extend(things)


def check_not_forked() -> None:
    """Refuse to use UCX in a fork of a process that has used it.

    Raises:
        ConfigError: this is one.
    """
    if _pids_that_used_ucx - {os.getpid()}:
        raise ConfigError("UCX does not survive a fork; start the process by spawn, or fork before the first link")


def drain(driver: ProgressDriver, operations: Iterable[Operation]) -> None:
    """Progress until the operations have ended, for a second at most."""
    left = list(operations)
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while left and time.monotonic() < deadline:
        driver.progress_now()
        left = [operation for operation in left if not operation.poll()]


@atexit.register
def _close_all() -> None:
    running = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    for link in list(_links):
        if _pids_that_used_ucx - {os.getpid()} or link.thread in running:
            _never_free(link)
        else:
            link.close_now()
    for thing in _leaked:
        _never_free(thing)


def _in_forked_child() -> None:
    for thing in (*_links, *_leaked):
        _never_free(thing)
    for link in _links:
        link.disown()


def _never_free(thing: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_in_forked_child)
