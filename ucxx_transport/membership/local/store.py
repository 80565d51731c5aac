"""`LocalStore`: the Store protocol over one SQLite file."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import StoreResetError, StoreUnavailableError, TransportError
from ucxx_transport.membership.keys import Namespace, checked_expected, checked_lease_id, checked_value
from ucxx_transport.membership.leases import checked_ttl_s, is_over, pause_s
from ucxx_transport.membership.local import tables
from ucxx_transport.membership.local.database import Database
from ucxx_transport.membership.local.store_file import checked_path, default_path
from ucxx_transport.membership.store import Batch, Entry, Event, Lease, Snapshot, Store, Watch

ResultT = TypeVar("ResultT")

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_POLL_S: Final = 0.05
_READ_BYTES: Final = 4 << 20
"""Of keys and values that a watch fetches at once, give or take a revision."""


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
            path: of the file; None: this user's own on this machine (see `local.store_file`).
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
        self._boot_id = boot_id or _BOOT_ID.read_text(encoding="ascii").strip()
        self._database = Database(checked_path(path or default_path()), boot_id=self._boot_id)
        self._watches: weakref.WeakSet[LocalWatch] = weakref.WeakSet()

    @property
    def url(self) -> str:
        return self._database.path.as_uri().replace("file://", "local://", 1)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r}, namespace={self._config.namespace!r})"

    def identity(self, *, timeout_s: float | None = None) -> str:
        return self._read(lambda db: tables.state(db).store_id, timeout_s)

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        checked_ttl_s(ttl_s)
        lease_id = self._write(lambda db, now: tables.add_lease(db, ttl_s, now), timeout_s)
        return Lease(lease_id=lease_id, ttl_s=float(ttl_s))

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        checked_lease_id(lease_id)
        return self._write(lambda db, now: tables.renew(db, lease_id, now), timeout_s)

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        checked_lease_id(lease_id)
        self._write(lambda db, _now: tables.end_lease(db, lease_id), timeout_s)

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
        checked_value(value)
        checked_expected(expected)
        if lease_id is not None:
            checked_lease_id(lease_id)
        return self._write(
            lambda db, _now: tables.put(db, stored, value, lease_id=lease_id, expected=expected), timeout_s
        )

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self._namespace.stored(key)
        checked_expected(expected)
        return self._write(lambda db, _now: tables.delete(db, stored, expected=expected), timeout_s)

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self._namespace.bounds(prefix)

        def read(db: sqlite3.Connection) -> tuple[int, list[tables.Row]]:
            return tables.state(db).revision, tables.rows(db, first, end)

        revision, found = self._read(read, timeout_s)
        return Snapshot(revision=revision, entries=tuple(self._entry(row) for row in found))

    def watch(self, prefix: str = "", *, after: int) -> LocalWatch:
        self._database.check_open()
        watch = LocalWatch(
            self._database,
            self._namespace,
            prefix,
            after=after,
            timeout_s=self._config.timeout_s,
            clock=self._clock,
            expire=lambda until: self._database.write(self._expire, until=until),
        )
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        for watch in list(self._watches):
            watch.close()
        self._database.close(self._config.timeout_s)

    def _entry(self, row: tables.Row) -> Entry:
        return Entry(key=self._namespace.key(row.key), value=row.value, revision=row.revision, lease_id=row.lease_id)

    def _expire(self, db: sqlite3.Connection) -> float:
        """End the leases that are over; returns the time."""
        now = self._clock()
        tables.expire(db, now, self._boot_id)
        return now

    def _read(self, body: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> ResultT:
        """What `body` reads when no lease is over."""
        until = self._until(timeout_s)

        def unless_over(db: sqlite3.Connection) -> tuple[ResultT] | None:
            return None if is_over(tables.first_deadline(db), self._clock()) else (body(db),)

        while (seen := self._database.read(unless_over, until=until)) is None:
            self._database.write(self._expire, until=until)
        return seen[0]

    def _write(self, change: Callable[[sqlite3.Connection, float], ResultT], timeout_s: float | None) -> ResultT:
        """What `change` returns, made after the leases that are over have ended."""
        return self._database.write(lambda db: change(db, self._expire(db)), until=self._until(timeout_s))

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._config.timeout_s if timeout_s is None else timeout_s)


class LocalWatch(Watch):
    """Changes below a prefix: reads the log 20 times a second, and ends leases that are over."""

    def __init__(
        self,
        database: Database,
        namespace: Namespace,
        prefix: str,
        *,
        after: int,
        timeout_s: float,
        clock: Callable[[], float],
        expire: Callable[[float], object],
    ) -> None:
        """Nothing is read yet.

        Args:
            database: the store's; its identity now, where it is known, is the one that is watched.
            namespace: of the keys.
            prefix: of the keys.
            after: the revision after which changes are wanted.
            timeout_s: how long a locked file is tolerated.
            clock: of the leases' deadlines.
            expire: ends the leases that are over, until a time on the monotonic clock.
        """
        self._database = database
        self._key = namespace.key
        self._first, self._end = namespace.bounds(prefix)
        self._after = after
        self._timeout_s = timeout_s
        self._clock = clock
        self._expire = expire
        self._store_id = database.store_id
        self._first_deadline: float | None = None
        self._locked_since: float | None = None
        self._seen_version: tuple[int, int] | None = None
        self._batches: deque[Batch] = deque()
        self._closing = threading.Event()
        self._pid = os.getpid()

    def next(self, timeout_s: float) -> Batch | None:
        until = time.monotonic() + max(0.0, timeout_s)
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch again after a fork", pid=self._pid)
        while True:
            self._check_open()
            if not self._batches:
                try:
                    self._fetch()
                except TransportError:
                    self._check_open()  # closed in the meantime: that is what its user should know
                    raise
            if self._batches:
                return self._batches.popleft()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None
            now = self._clock()
            pause = pause_s(now=now, until=now + left_s, first_deadline=self._first_deadline, poll_s=_POLL_S)
            self._closing.wait(pause)

    def close(self) -> None:
        self._closing.set()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the watch is closed", path=str(self._database.path))

    def _fetch(self) -> None:
        """Take what has changed, after having ended what is over."""
        self._read_log()
        if is_over(self._first_deadline, self._clock()) and self._expired():
            self._read_log()

    def _read_log(self) -> None:
        until = time.monotonic() + self._timeout_s
        version = self._database.version(until=until)
        if version == self._seen_version:
            return
        state, self._first_deadline, batches, self._after = self._database.read(self._changes, until=until)
        self._store_id = state.store_id
        self._batches.extend(batches)
        self._seen_version = version if self._after == state.revision else None  # there is more than was fetched

    def _changes(self, db: sqlite3.Connection) -> tuple[tables.State, float | None, list[Batch], int]:
        state = tables.state(db)
        if self._store_id not in {"", state.store_id}:
            raise StoreResetError("the store's file was deleted or replaced: start over", path=str(self._database.path))
        after, found = tables.changes(db, self._first, self._end, after=self._after, limit_bytes=_READ_BYTES)
        batches = [
            Batch(revision=changes[0].revision, events=tuple(self._event(change) for change in changes))
            for changes in found
        ]
        return state, tables.first_deadline(db), batches, after

    def _event(self, change: tables.Change) -> Event:
        return Event(
            kind=cast("Literal['put', 'delete']", change.kind),
            key=self._key(change.key),
            value=change.value,
            revision=change.revision,
            lease_id=change.lease_id,
        )

    def _expired(self) -> bool:
        """End what is over; where the file is locked, at a later poll, as long as that is tolerated."""
        now = time.monotonic()
        try:
            self._expire(now)
        except StoreUnavailableError:
            self._locked_since = self._locked_since or now
            if now - self._locked_since > self._timeout_s:
                raise
            return False
        self._locked_since = None
        return True
