"""`LocalStore`: the Store protocol over one SQLite file.

One connection, behind a lock: a call takes some 20 to 100 µs, writes are one at a time in any case, and a
thread's own connection would be left behind by a thread that ends.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, StoreUnavailableError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keys import Namespace, checked_expected, checked_lease_id, checked_value
from ucxx_transport.membership.leases import checked_ttl_s, is_over
from ucxx_transport.membership.local import tables
from ucxx_transport.membership.local.database import Database
from ucxx_transport.membership.local.forking import closed_before_forks
from ucxx_transport.membership.local.place import checked_path, default_path
from ucxx_transport.membership.local.watch import LocalWatch, WatchedStore
from ucxx_transport.membership.store import Entry, Lease, Snapshot

__all__ = ["LocalStore"]

ResultT = TypeVar("ResultT")

_log = get_logger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class LocalStore:
    """A store for the processes of one machine, embedded: no server, no port.

    It is made by whoever comes first. A lease that has run out is ended by whoever touches or watches the store next.
    """

    def __init__(
        self,
        path: Path | None = None,
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] | None = None,
        boot_id: str | None = None,
    ) -> None:
        """Name the file; it is opened, or made, by the first call.

        Args:
            path: of the file; None: this user's own on this machine (see `local.place`).
            config: namespace and time limit.
            clock: of the leases' deadlines: seconds that all processes count alike, and that sleep is part of.
            boot_id: changes when that clock begins anew: the leases of another one are over.

        Raises:
            ConfigError: the path can hold no store.
            StorePermissionError: this user may not use it, or somebody else's folder stands where the default is.
        """
        self._config = config or StoreConfig()
        self._path = checked_path(path or default_path())
        self._namespace = Namespace(self._config.namespace)
        self._clock = clock or _boot_time
        self._boot_id = boot_id or _BOOT_ID.read_text(encoding="ascii").strip()
        self._closed = False
        self._watches: weakref.WeakSet[LocalWatch] = weakref.WeakSet()
        self._connected = _Connected()
        closed_before_forks(self._connected)

    @property
    def url(self) -> str:
        return self._path.as_uri().replace("file://", "local://", 1)

    def __repr__(self) -> str:
        """What it is and where."""
        return f"LocalStore({self.url!r}, namespace={self._config.namespace!r})"

    def identity(self, *, timeout_s: float | None = None) -> str:
        return self._run(lambda database, _until: database.store_id, timeout_s)

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

        def look(db: sqlite3.Connection) -> tuple[int, list[tables.Row]]:
            return tables.state(db).revision, tables.rows(db, first, end)

        revision, found = self._read(look, timeout_s)
        return Snapshot(revision=revision, entries=tuple(self._entry(row) for row in found))

    def watch(self, prefix: str = "", *, after: int) -> LocalWatch:
        self._check_open()
        watched = WatchedStore(
            path=self._path,
            namespace=self._namespace,
            timeout_s=self._config.timeout_s,
            boot_id=self._boot_id,
            clock=self._clock,
            store_id=self._connected.store_id,
            on_reset=self._connected.forget,
        )
        watch = LocalWatch(watched, prefix, after=after)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        self._closed = True
        for watch in list(self._watches):
            watch.close()
        # Bounded: a signal handler that closes the store may have interrupted a call that holds the lock.
        if self._connected.lock.acquire(timeout=self._config.timeout_s):
            try:
                self._connected.let_go()
            finally:
                self._connected.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, row: tables.Row) -> Entry:
        return Entry(key=self._namespace.key(row.key), value=row.value, revision=row.revision, lease_id=row.lease_id)

    def _read(self, look: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> ResultT:
        """What `look` sees when no lease is over."""

        def body(database: Database, until: float) -> ResultT:
            def unless_over(db: sqlite3.Connection) -> tuple[ResultT] | None:
                return None if is_over(tables.first_deadline(db), self._clock()) else (look(db),)

            while (seen := database.read(unless_over, until=until)) is None:
                database.write(lambda db: tables.expire(db, self._clock(), self._boot_id), until=until)
            return seen[0]

        return self._run(body, timeout_s)

    def _write(self, change: Callable[[sqlite3.Connection, float], ResultT], timeout_s: float | None) -> ResultT:
        """What `change` returns, made after the leases that are over have ended."""

        def ended_then_changed(db: sqlite3.Connection) -> ResultT:
            now = self._clock()
            tables.expire(db, now, self._boot_id)
            return change(db, now)

        return self._run(lambda database, until: database.write(ended_then_changed, until=until), timeout_s)

    def _run(self, body: Callable[[Database, float], ResultT], timeout_s: float | None) -> ResultT:
        until = time.monotonic() + (self._config.timeout_s if timeout_s is None else timeout_s)
        connected = self._connected
        if connected.spoiled:
            raise StoreUnavailableError("the fork came in the middle of a call: open the store anew", url=self.url)
        if not connected.lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreUnavailableError("other threads' calls took until the deadline", path=str(self._path))
        try:
            self._check_open()
            return body(self._current(until), until)
        finally:
            connected.lock.release()

    def _current(self, until: float) -> Database:
        """The connection to the file that stands there now: another one when it was deleted or replaced."""
        connected = self._connected
        database = connected.database
        if database is not None and database.is_current():
            return database
        if database is not None:
            connected.let_go()
            _log.warning("store_replaced", url=self.url, store_id=connected.store_id)
        opened = Database.open(self._path, boot_id=self._boot_id, until=until)
        assert opened is not None  # it makes what is missing
        connected.database, connected.store_id = opened, opened.store_id
        return opened

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the store is closed: open another", url=self.url)


class _Connected:
    """The connection, and the lock that threads take turns by."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.database: Database | None = None
        self.store_id = ""
        self.spoiled = False

    def forget(self) -> None:
        """A watch has found the store to be another one: the next one takes it as it is."""
        self.store_id = ""

    def let_go(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None

    def pause(self, timeout_s: float) -> bool:
        if not self.lock.acquire(timeout=timeout_s):
            return False
        self.let_go()
        return True

    def resume(self) -> None:
        self.lock.release()

    def spoil(self) -> None:
        self.spoiled = True


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
