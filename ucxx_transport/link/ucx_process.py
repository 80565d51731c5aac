"""UCX in one process: what outlives a link.

- A link that is never closed stays until the interpreter ends, and is closed then: an operation in flight whose buffer
  the interpreter frees first would be a crash. One whose last thread still runs then (a daemon's) is left as it is.
- UCX does not survive a fork. In the child, what the parent had is never freed, so that nothing closes the parent's
  connections, and every use is an error that says so.
- The buffer of an operation that never ends is kept for good: UCX may still write to it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from typing import Protocol

from ucxx_transport.errors import ConfigError
from ucxx_transport.link.base import FORKED


class OpenLink(Protocol):
    """A `UCXXLink`, as this module sees it.

    Attributes:
        thread: that had its last turn.
    """

    thread: int

    def close(self) -> None: ...
    def forget(self) -> None: ...


_links: set[OpenLink] = set()
_leaked: list[object] = []
_pids_that_used_ucx: set[int] = set()


def check_not_forked() -> None:
    """Refuse to use UCX in a fork of a process that has used it.

    Raises:
        ConfigError: this is one.
    """
    if _pids_that_used_ucx - {os.getpid()}:
        raise ConfigError(FORKED)


def link_opened(link: OpenLink) -> None:
    """Keep the link until `link_closed`."""
    _pids_that_used_ucx.add(os.getpid())
    _links.add(link)


def link_closed(link: OpenLink) -> None:
    """Release it."""
    _links.discard(link)


def keep_for_good(*things: object) -> None:
    """Never free these: UCX may still use them."""
    _leaked.extend(things)


@atexit.register
def _close_all() -> None:
    running = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    for link in list(_links):
        if _pids_that_used_ucx - {os.getpid()} or link.thread in running:
            _never_free(link)
        else:
            link.close()
    for thing in _leaked:
        _never_free(thing)


def _in_forked_child() -> None:
    for thing in (*_links, *_leaked):
        _never_free(thing)
    for link in _links:
        link.forget()


def _never_free(thing: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_in_forked_child)
