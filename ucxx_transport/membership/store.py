"""The Store protocol: what membership needs of a key-value store.

A store keeps keys with values, under leases or for ever. Every change of its content has a revision, which only grows;
a key's own revision is that of its last change. Keys are text below the store's namespace, without a leading "/".
What goes wrong is one of the errors below `RegistryError`: `errors` says what each means, and what the caller does.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Final, Protocol, Self

from ucxx_transport.config import StoreConfig, checked_seconds
from ucxx_transport.errors import ConfigError, ConflictError, LeaseLostError, StoreUnavailableError, TransportError
from ucxx_transport.membership.entries import MAX_VALUE_BYTES, Batch, Entry, Lease, Snapshot
from ucxx_transport.teardown import Closing

MAX_TTL_S: Final = 1e9  # thirty years; etcd refuses more than 9e9 s


def check_write(*, value: object = b"", lease_id: object = None, expected: object = None) -> None:
    """Raise a ConfigError for a value, a lease or an expected revision (0: of no key) that no store takes."""
    if not isinstance(value, bytes):
        raise ConfigError(f"value must be bytes, not {type(value).__name__}", field="value")
    if len(value) > MAX_VALUE_BYTES:
        text = f"value has {len(value)} bytes: a store keeps at most {MAX_VALUE_BYTES}"
        raise ConfigError(text, field="value", nbytes=len(value))
    for field, found, least in (("lease_id", lease_id, 1), ("expected", expected, 0)):
        if found is not None and not (type(found) is int and least <= found < 1 << 63):
            raise ConfigError(f"{field} = {found!r}: a number from {least} on is wanted", field=field)


def checked_ttl_s(ttl_s: object) -> float:
    """A time to live that a store can grant; a ConfigError unless it is a number above 0 and up to `MAX_TTL_S`."""
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 0 < ttl_s <= MAX_TTL_S:
        text = f"ttl_s = {ttl_s!r}: a lease lives for more than 0 and at most {MAX_TTL_S:.0e} seconds"
        raise ConfigError(text, field="ttl_s")
    return float(ttl_s)


def lease_lost(lease_id: int) -> LeaseLostError:
    """For a lease that is not there."""
    return LeaseLostError("the lease has ended: take another one and put its keys again", lease_id=lease_id)


def revision_conflict(stored: bytes, expected: int, revision: int) -> ConflictError:
    """For a key, as stored, with another revision than expected; 0: it does not exist."""
    text = "the key has another revision than expected; nothing was changed"
    return ConflictError(text, key=stored.decode(errors="replace"), expected=expected, revision=revision)


class Watch(Closing):
    """Changes below a prefix, in order, none left out. Used by one thread; close it, or use `with`.

    A kind of store takes them by `_fetch`, in the thread of `next`: several at once, which are given one by one.
    """

    def __init__(self, url: str) -> None:
        self._url, self._pid = url, os.getpid()
        self._batches: deque[Batch] = deque()
        self._closing = threading.Event()

    def next(self, timeout_s: float) -> Batch | None:
        """The next batch; None when none came within `timeout_s`.

        Raises:
            StoreUnavailableError: the store cannot be reached. Call again: the watch goes on after its last batch. Or
                it is closed, or another process's: then for good.
            CompactedError, StoreResetError, StorePermissionError: for good. A wiped store is noticed within about two
                seconds while `next` is being called, even when nothing changes in it.
        """
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
        """End the watch. Idempotent; callable from another thread, whose `next` then raises `StoreUnavailableError`."""
        self._closing.set()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the watch is closed", url=self._url)

    def _fetch(self, until: float) -> None:
        """Wait for changes until then at the most, and take what has come."""
        raise NotImplementedError


class Store(Protocol):
    """A key-value store with leases, revisions and watches. Thread-safe; close it, or use `with`.

    Every call ends within `timeout_s` (None: the store's configured one), by an answer or one of those errors; or by a
    `ConfigError`, which names what no call can mend: an argument, or what is found where the store should be. A forked
    child may go on using a store, but not a watch.
    """

    url: str
    """Where it is, without secrets."""
    config: StoreConfig
    """What it was opened with: a process that is to use it too opens its URL with that."""

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        """A new lease that lives at least `ttl_s` seconds unless it is renewed."""

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        """Renew a lease; returns the seconds that it now has. A LeaseLostError: it has ended, or never was."""

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """End a lease, and with it its keys, in one revision. One that has ended already is no error."""

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        """One key, or None."""

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Write a key; returns the revision of this change.

        Nothing was written after a ConflictError or LeaseLostError; after a StoreUnavailableError it may have been:
        read it.

        Args:
            key: below the store's namespace.
            value: 1 MiB at most.
            lease_id: the lease it dies with; None: it stays.
            expected: the revision the key must have now; 0: it must not exist; None: any.
            timeout_s: see the class.
        """

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        """Remove a key; returns whether it was there. A ConflictError: with another revision than `expected`."""

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        """All keys that begin with `prefix`, at one revision."""

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> Watch:
        """Changes below `prefix` after a revision: a snapshot's, or the last batch's. Its `next` raises what is wrong.

        Args:
            prefix: of the keys.
            after: larger than the store's own: the store was reset.
            identity: of the snapshot; "": the store is taken as it is.
        """

    def close(self) -> None:
        """Close connections and files, and end the watches; leases live on. Idempotent; a later call: a ConfigError."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
