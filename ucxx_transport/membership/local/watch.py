"""A watch of the store's file: looks 20 times a second whether it has changed, and ends leases that are over."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, cast

from ucxx_transport.errors import ConfigError, StorePermissionError, StoreResetError, StoreUnavailableError
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.leases import is_over, pause_s
from ucxx_transport.membership.local import tables
from ucxx_transport.membership.local.database import Database
from ucxx_transport.membership.local.forking import closed_before_forks
from ucxx_transport.membership.store import Batch, Event

__all__ = ["LocalWatch", "WatchedStore"]

POLL_S: Final = 0.05
IDENTITY_S: Final = 0.5
"""How often an idle watch sees whether the file is still the same one: a tenth of what looking at it costs."""
_READ_BYTES: Final = 4 << 20
"""Of keys and values that one look at the log fetches, give or take a revision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedStore:
    """What a watch needs of its store.

    Attributes:
        path: the file.
        namespace: of the keys.
        timeout_s: how long a locked file is put up with.
        boot_id: names the boot of the machine.
        clock: of the leases' deadlines.
        store_id: as it was when the watch was asked for; "" when nobody had looked yet.
        on_reset: called when the store turns out to be another one.
    """

    path: Path
    namespace: Namespace
    timeout_s: float
    boot_id: str
    clock: Callable[[], float]
    store_id: str
    on_reset: Callable[[], None]


class LocalWatch:
    """Changes below a prefix, read from the log by a connection of its own."""

    def __init__(self, store: WatchedStore, prefix: str, *, after: int) -> None:
        self._store = store
        self._first, self._end = store.namespace.bounds(prefix)
        self._after = after
        self._store_id = store.store_id
        self._pid = os.getpid()
        self._database: Database | None = None
        self._seen_version: int | None = None
        self._first_deadline: float | None = None
        self._next_identity = 0.0
        self._locked_since: float | None = None
        self._batches: deque[Batch] = deque()
        self._closing = threading.Event()
        # Reentrant: a signal handler may close the watch in the thread that is in `next`.
        self._lock = threading.RLock()
        closed_before_forks(self)

    def next(self, timeout_s: float) -> Batch | None:
        until = time.monotonic() + max(0.0, timeout_s)
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch anew after a fork", pid=self._pid)
        while True:
            with self._lock:
                self._check_open()
                if not self._batches:
                    self._look()
                if self._batches:
                    return self._batches.popleft()
            now = time.monotonic()
            if now >= until:
                return None
            self._closing.wait(self._pause_s(until - now))

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # it is the parent's: nothing of it is open here
        self._closing.set()
        with self._lock:
            self._let_go()

    def pause(self, timeout_s: float) -> bool:
        if not self._lock.acquire(timeout=timeout_s):
            return False
        self._let_go()
        return True

    def resume(self) -> None:
        self._lock.release()

    def spoil(self) -> None:
        """Nothing more to refuse: a watch is of no use to a child."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the watch is closed", path=str(self._store.path))

    def _let_go(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database, self._seen_version = None, None

    def _pause_s(self, left_s: float) -> float:
        now = self._store.clock()
        return pause_s(now=now, until=now + left_s, first_deadline=self._first_deadline, poll_s=POLL_S)

    def _look(self) -> None:
        """Fetch what has changed, having ended what is over."""
        try:
            database = self._opened()
            version: int | None = database.version()
            idle = version == self._seen_version and not is_over(self._first_deadline, self._store.clock())
            if idle and time.monotonic() < self._next_identity:
                return
            if not database.is_current():
                raise self._reset()
            self._next_identity = time.monotonic() + IDENTITY_S
            if idle:
                return
            if self._end_leases(database):
                version = database.version()
            if database.read(self._fetch, until=time.monotonic() + self._store.timeout_s):
                version = None  # there is more in the log than was fetched
            self._seen_version = version
        except (StoreUnavailableError, StorePermissionError, ConfigError) as error:
            self._check_open()  # closed meanwhile: that is what its user is told
            if self._database is not None and not self._database.is_current():
                raise self._reset() from error  # an emptied file reads as a damaged one
            raise

    def _opened(self) -> Database:
        if self._database is None:
            until = time.monotonic() + self._store.timeout_s
            make = not self._store_id
            database = Database.open(self._store.path, boot_id=self._store.boot_id, until=until, make=make)
            if database is None:
                raise self._reset()
            if self._store_id not in {"", database.store_id}:
                database.close()
                raise self._reset()
            self._database, self._store_id = database, database.store_id
        return self._database

    def _reset(self) -> StoreResetError:
        self._store.on_reset()
        return StoreResetError("the store's file was deleted or replaced: start over", path=str(self._store.path))

    def _end_leases(self, database: Database) -> bool:
        """End what is over; where the file is locked, at a later look, as long as that is put up with."""
        clock, boot_id = self._store.clock, self._store.boot_id
        moment = time.monotonic()
        self._first_deadline = database.read(tables.first_deadline, until=moment + self._store.timeout_s)
        if not is_over(self._first_deadline, clock()):
            return False
        try:
            database.write(lambda db: tables.expire(db, clock(), boot_id), until=moment)
        except StoreUnavailableError:
            self._locked_since = self._locked_since or moment
            if moment - self._locked_since > self._store.timeout_s:
                raise
            return False
        self._locked_since = None
        self._first_deadline = database.read(tables.first_deadline, until=moment + self._store.timeout_s)
        return True

    def _fetch(self, db: sqlite3.Connection) -> bool:
        """Take the next batches from the log; returns whether it may hold more."""
        nbytes = 0
        key = self._store.namespace.key
        for revision, batch in tables.changes(db, self._first, self._end, after=self._after, limit_bytes=_READ_BYTES):
            events = tuple(
                Event(
                    kind=cast("Literal['put', 'delete']", change.kind),
                    key=key(change.key),
                    value=change.value,
                    revision=revision,
                    lease_id=change.lease_id,
                )
                for change in batch
            )
            self._batches.append(Batch(revision=revision, events=events))
            self._after = revision
            nbytes += sum(len(change.key) + len(change.value) for change in batch)
        if nbytes >= _READ_BYTES:
            return True
        self._after = tables.state(db).revision  # what lies elsewhere has been passed over, and may be compacted
        return False
