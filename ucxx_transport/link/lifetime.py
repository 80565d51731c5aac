"""What outlives a link: clean-up at the end of the interpreter, forked children, parked buffers.

- At exit, links of the exiting thread that are still open are closed: an operation in flight whose buffer the
  interpreter frees first would be a crash. A link of another thread is left as it is; that thread no longer runs.
- UCX does not survive a fork. In the child, its objects are made immortal, so that nothing closes the parent's
  connections, and every use is an error that says so.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from ucxx_transport.link.driver import ProgressDriver
    from ucxx_transport.link.pending import Operation
    from ucxx_transport.link.ucxx import UCXXLink

__all__ = ["PARKED", "check_not_forked", "drain", "register", "unregister"]

DRAIN_TIMEOUT_S = 1.0

PARKED: list[tuple[object, object]] = []
"""Operations that never ended, with what they point to."""

_links: weakref.WeakSet[UCXXLink] = weakref.WeakSet()
_pids_that_used_ucx: set[int] = set()


def register(link: UCXXLink) -> None:
    """A link was opened in this process."""
    _pids_that_used_ucx.add(os.getpid())
    _links.add(link)


def unregister(link: UCXXLink) -> None:
    """A link was closed."""
    _links.discard(link)


def check_not_forked() -> None:
    """Refuse to use UCX in a fork of a process that has used it.

    Raises:
        ConfigError: this is one.
    """
    if _pids_that_used_ucx - {os.getpid()}:
        raise ConfigError("UCX does not survive a fork; start the process by spawn, or fork before the first link")


def drain(driver: ProgressDriver, operations: Sequence[Operation]) -> None:
    """Progress until the operations have ended, for a second at most."""
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while any(not operation.poll() for operation in operations) and time.monotonic() < deadline:
        driver.progress_now()


@atexit.register
def _close_all() -> None:
    if _pids_that_used_ucx - {os.getpid()}:
        return
    for link in list(_links):
        if link.owned_by(threading.get_ident()):
            link.close_now()


def _abandon(thing: Any) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _in_forked_child() -> None:
    for link in list(_links):
        for thing in link.ucx_objects():
            _abandon(thing)


os.register_at_fork(after_in_child=_in_forked_child)
