"""`LocalStore`: the Store protocol over one SQLite file."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Final, Literal, TypeVar

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import StoreResetError, StoreUnavailableError, TransportError
from ucxx_transport.membership.keys import Namespace, check_write, checked_ttl_s
from ucxx_transport.membership.local import tables
from ucxx_transport.membership.local.database import Database, checked_path, default_path
from ucxx_transport.membership.store import Batch, Entry, Event, Lease, Snapshot, Store, Watch
from ucxx_transport.ring import owner

ResultT = TypeVar("ResultT")

_POLL_S: Final = 0.05


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LocalStore(Store):
    """A store for the processes of one machine, embedded: no server, no port.

    The first call of any process makes it. A lease that has run out is ended by the next call or watch of any process.
    """

    def __init__(
        self,
        path: Path | None = None,
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] = _boot_time,
        boot_id: str | None = None,
    ) -> None:
        """Name the file; it is opened, or made, by the first call.

        Args:
            path: of the file; None: this user's own on this machine (see `local.database`).
            config: namespace and time limit.
            clock: of the leases' deadlines: seconds that all processes count alike, and that sleep is part of.
            boot_id: changes when that clock begins again: the leases of another one are over.

        Raises:
            ConfigError: the path can hold no store.
            StorePermissionError: this user may not use it, or another user's folder is where the default lies.
        """
        self._config = config or StoreConfig()
        self._namespace = Namespace(self._config.namespace)
        self._clock = clock
        self._database = Database(
            checked_path(path or default_path()), clock, owner.boot_id().hex() if boot_id is None else boot_id
        )
        self._watches: weakref.WeakSet[LocalWatch] = weakref.WeakSet()

    @property
    def url(self) -> str:
        return self._database.path.as_uri().replace("file://", "local://", 1)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r}, namespace={self._config.namespace!r})"

    def identity(self, *, timeout_s: float | None = None) -> str:
        return self._read(lambda db: tables.state(db).store_id, timeout_s)

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        ttl_s = checked_ttl_s(ttl_s)
        lease_id = self._write(lambda db: tables.add_lease(db, ttl_s, self._clock()), timeout_s)
        return Lease(lease_id=lease_id, ttl_s=ttl_s)

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        check_write(lease_id=lease_id)
        return self._write(lambda db: tables.renew(db, lease_id, self._clock()), timeout_s)

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        check_write(lease_id=lease_id)
        self._write(lambda db: tables.end_lease(db, lease_id), timeout_s)

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        stored = self._namespace.stored(key)
        found = self._read(lambda db: tables.row(db, stored), timeout_s)
        return None if found is None else self._entry(found)

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        stored = self._namespace.stored(key)
        check_write(value=value, lease_id=lease_id, expected=expected)
        return self._write(lambda db: tables.put(db, stored, value, lease_id, expected), timeout_s)

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self._namespace.stored(key)
        check_write(expected=expected)
        return self._write(lambda db: tables.delete(db, stored, expected), timeout_s)

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self._namespace.bounds(prefix)
        revision, rows = self._read(lambda db: (tables.state(db).revision, tables.rows(db, first, end)), timeout_s)
        return Snapshot(revision=revision, entries=tuple(map(self._entry, rows)))

    def watch(self, prefix: str = "", *, after: int) -> LocalWatch:
        self._database.check_open()
        watch = LocalWatch(self._database, self._namespace, prefix, after=after, timeout_s=self._config.timeout_s)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        for watch in list(self._watches):
            watch.close()
        self._database.close(self._config.timeout_s)

    def _entry(self, row: tables.Row) -> Entry:
        key = self._namespace.key(row.key)
        return Entry(key=key, value=row.value or b"", revision=row.revision, lease_id=row.lease_id)

    def _read(self, body: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> ResultT:
        return self._database.read(body, until=self._until(timeout_s))

    def _write(self, body: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> ResultT:
        return self._database.write(body, until=self._until(timeout_s))

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._config.timeout_s if timeout_s is None else timeout_s)


class LocalWatch(Watch):
    """Changes below a prefix: reads the log 20 times a second, and ends leases when they are over."""

    def __init__(self, database: Database, namespace: Namespace, prefix: str, *, after: int, timeout_s: float) -> None:
        """Watch the store that the database has open, or else opens first; tolerate a locked file for `timeout_s`."""
        self._database = database
        self._key = namespace.key
        self._first, self._end = namespace.bounds(prefix)
        self._after = after
        self._timeout_s = timeout_s
        self._store_id = database.store_id
        self._locked_since: float | None = None
        self._batches: deque[Batch] = deque()
        self._closing = threading.Event()
        self._pid = os.getpid()

    def next(self, timeout_s: float) -> Batch | None:
        until = time.monotonic() + max(0.0, timeout_s)
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch again after a fork", pid=self._pid)
        while True:
            self._check_open()
            pause_s = 0.0
            if not self._batches:
                try:
                    pause_s = self._fetch()
                except TransportError:
                    self._check_open()  # closed in the meantime: that is what its user should know
                    raise
            if self._batches:
                return self._batches.popleft()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None
            self._closing.wait(min(left_s, pause_s))

    def close(self) -> None:
        self._closing.set()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the watch is closed", path=str(self._database.path))

    def _fetch(self) -> float:
        """Take what has changed, after the leases that are over have ended; returns when to do so again.

        Where the file is locked, they are ended at a later poll, as long as that is tolerated.
        """
        now = time.monotonic()
        _, left_s = self._database.peek(self._take, until=now + self._timeout_s)
        if left_s > 0:
            self._locked_since = None
            return min(left_s, _POLL_S)
        try:
            self._database.write(self._take, until=now + _POLL_S)
        except StoreUnavailableError:
            self._locked_since = self._locked_since or now
            if now - self._locked_since > self._timeout_s:
                raise
            return _POLL_S
        return 0.0

    def _take(self, db: sqlite3.Connection) -> None:
        found = tables.state(db)
        if self._store_id not in {"", found.store_id}:
            raise StoreResetError("the store's file was deleted or replaced: start over", path=str(self._database.path))
        rows = tables.changes(db, self._first, self._end, after=self._after)
        for revision, changed in groupby(rows, key=lambda row: row.revision):
            self._batches.append(Batch(revision=revision, events=tuple(map(self._event, changed))))
        self._store_id, self._after = found.store_id, found.revision

    def _event(self, row: tables.Row) -> Event:
        kind: Literal["put", "delete"] = "delete" if row.value is None else "put"
        key = self._key(row.key)
        return Event(kind=kind, key=key, value=row.value or b"", revision=row.revision, lease_id=row.lease_id)
