"""What every kind of store has: checks of its arguments, errors of what it finds, and a watch that queues batches."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Final

from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, ConflictError, LeaseLostError, StoreUnavailableError, TransportError
from ucxx_transport.membership.keys import MAX_VALUE_BYTES
from ucxx_transport.membership.store import Batch, Watch

MAX_TTL_S: Final = 1e9
"""Thirty years; etcd refuses more than 9e9 s."""


def check_write(*, value: object = b"", lease_id: object = None, expected: object = None) -> None:
    """Raise a ConfigError for a value, a lease or an expected revision (0: of no key) that no store takes."""
    if not isinstance(value, bytes):
        raise ConfigError(f"value must be bytes, not {type(value).__name__}", field="value")
    if len(value) > MAX_VALUE_BYTES:
        raise ConfigError(
            f"value has {len(value)} bytes: a store keeps at most {MAX_VALUE_BYTES}", field="value", nbytes=len(value)
        )
    for field, found, least in (("lease_id", lease_id, 1), ("expected", expected, 0)):
        if found is not None and not (type(found) is int and least <= found < 1 << 63):
            raise ConfigError(f"{field} = {found!r}: a number from {least} on is wanted", field=field)


def checked_ttl_s(ttl_s: object) -> float:
    """A time to live that a store can grant; a ConfigError unless it is a number above 0 and up to `MAX_TTL_S`."""
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 0 < ttl_s <= MAX_TTL_S:
        raise ConfigError(
            f"ttl_s = {ttl_s!r}: a lease lives for more than 0 and at most {MAX_TTL_S:.0e} seconds", field="ttl_s"
        )
    return float(ttl_s)


def lease_lost(lease_id: int) -> LeaseLostError:
    """The error for a lease that is not there."""
    return LeaseLostError("the lease has ended: take another one and put its keys again", lease_id=lease_id)


def revision_conflict(stored: bytes, expected: int, revision: int) -> ConflictError:
    """The error for a key, as stored, with another revision than expected; 0: it does not exist."""
    return ConflictError(
        "the key has another revision than expected; nothing was changed",
        key=stored.decode(errors="replace"),
        expected=expected,
        revision=revision,
    )


class QueuedWatch(Watch):
    """A watch that takes its batches by `_fetch`, in the thread of `next`; several at once, given one by one."""

    def __init__(self, url: str) -> None:
        self._url, self._pid = url, os.getpid()
        self._batches: deque[Batch] = deque()
        self._closing = threading.Event()

    def next(self, timeout_s: float) -> Batch | None:
        until = time.monotonic() + checked_seconds(timeout_s, "timeout_s")
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch again after a fork", pid=self._pid)
        self._check_open()
        while not self._batches:
            try:
                self._fetch(until)
            except TransportError:
                self._check_open()  # closed in the meantime: that is what its user should know
                raise
            self._check_open()
            if not self._batches and time.monotonic() >= until:
                return None
        return self._batches.popleft()

    def close(self) -> None:
        self._closing.set()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the watch is closed", url=self._url)

    def _fetch(self, until: float) -> None:
        """Wait for changes until then at the most, and take what has come."""
        raise NotImplementedError
