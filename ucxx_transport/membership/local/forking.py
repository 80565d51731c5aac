"""No connection to SQLite is carried across a fork: all are closed before it, and opened again by their next use.

SQLite keeps one table of locks a process and file. A child inherits the table but none of the locks: a connection that
is opened in it takes for held what is not, and its neighbours overwrite what it reads; or it waits for ever for a lock
that a thread of its parent's had. It may not close what it has inherited either
(https://www.sqlite.org/howtocorrupt.html, 2.6).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Final, Protocol

__all__ = ["Holder", "closed_before_forks"]

_PATIENCE_S: Final = 5.0
"""A call under way is waited for: it ends by its own deadline, in general much sooner."""


class Holder(Protocol):
    """Has a connection, and a lock that it is used under."""

    def pause(self, timeout_s: float) -> bool:
        """Take the lock, close the connection, and keep the lock; False: the lock was not to be had in time."""

    def resume(self) -> None:
        """Let go of the lock."""

    def spoil(self) -> None:
        """Refuse from now on: this is a child, and the connection was in use when it was forked."""


_lock = threading.Lock()
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_paused: list[Holder] = []
_in_use: list[Holder] = []


def closed_before_forks(holder: Holder) -> None:
    """Close this one's connection before each fork, for as long as somebody has it."""
    with _lock:
        _holders.add(holder)


def _before() -> None:
    until = time.monotonic() + _PATIENCE_S
    _lock.acquire()
    for holder in list(_holders):
        (_paused if holder.pause(max(0.0, until - time.monotonic())) else _in_use).append(holder)


def _after() -> None:
    for holder in _paused:
        holder.resume()
    _paused.clear()
    _in_use.clear()
    _lock.release()


def _after_in_child() -> None:
    for holder in _in_use:
        holder.spoil()
    _after()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
