"""`LocalStore`: the Store protocol over one SQLite file.

| table     | row                                                                                         |
|-----------|---------------------------------------------------------------------------------------------|
| `state`   | one: the store's identity, the boot its deadlines are of, its revision, the size of the log |
| `entries` | a key, its value, the revision of its last change, its lease                                |
| `leases`  | a lease, its time to live, its deadline on CLOCK_BOOTTIME                                   |
| `log`     | a change, as an entry; NULL for the value of a deleted one. The newest revisions only       |

Each transaction that changes entries has one revision; a lease that has run out ends in one of its own.
"""

from __future__ import annotations

import math
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeVar

from ucxx_transport import machine
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import CompactedError, StoreResetError
from ucxx_transport.membership.entries import Batch, Entry, Event, Lease, Namespace, Snapshot
from ucxx_transport.membership.local_file import StoreFile, checked_path, default_path
from ucxx_transport.membership.store import Store, Watch, check_write, checked_ttl_s, lease_lost, revision_conflict

ResultT = TypeVar("ResultT")
_Row = tuple[bytes, bytes | None, int, int | None]  # of `entries` or `log`: key, value, revision, lease

KEPT_REVISIONS: Final = 10_000
KEPT_BYTES: Final = 16 << 20  # of keys and values in the log: a store of small records never meets it
_POLL_S: Final = 0.05
_boot_time: Final = partial(time.clock_gettime, time.CLOCK_BOOTTIME)

_TABLES: Final = """
CREATE TABLE state (store_id TEXT NOT NULL, boot_id TEXT NOT NULL, revision INTEGER NOT NULL,
  log_bytes INTEGER NOT NULL);
CREATE TABLE entries (key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL, lease_id INTEGER);
CREATE INDEX entries_by_lease ON entries (lease_id) WHERE lease_id IS NOT NULL;
CREATE TABLE leases (lease_id INTEGER PRIMARY KEY, ttl_s REAL NOT NULL, deadline_s REAL NOT NULL);
CREATE INDEX leases_by_deadline ON leases (deadline_s);
CREATE TABLE log (key BLOB NOT NULL, value BLOB, revision INTEGER NOT NULL, lease_id INTEGER);
CREATE INDEX log_by_revision ON log (revision);
INSERT INTO state VALUES (lower(hex(randomblob(16))), '', 0, 0)
"""


class LocalStore(Store):
    """A store for the processes of one machine, embedded: no server, no port. Its file: `path`, or this user's own.

    The first call of any process makes it. A lease that has run out is ended by the next call or watch of any process.
    A ConfigError or StorePermissionError: the path can hold no store, or this user may not use it.

    Args:
        clock: of the leases' deadlines: seconds that all processes count alike, and that sleep is part of.
        boot_id: changes when that clock begins again: the leases of another one are over.
    """

    def __init__(
        self,
        path: Path | None = None,
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] = _boot_time,
        boot_id: str | None = None,
    ) -> None:
        self.config = config = config or StoreConfig()
        self.namespace = Namespace(config.namespace)
        self._clock = clock
        self._boot_id = machine.boot_id().hex() if boot_id is None else boot_id
        self.file = StoreFile(checked_path(path or default_path()), _TABLES, config.timeout_s)
        self.url = self.file.path.as_uri().replace("file://", "local://", 1)

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        ttl_s = checked_ttl_s(ttl_s)
        lease_id = secrets.randbelow((1 << 63) - 1) + 1  # no lease of this or an earlier store has had it
        new = "INSERT INTO leases VALUES (?, ?, ?)"
        self._write(lambda db: db.execute(new, (lease_id, ttl_s, self._clock() + ttl_s)), timeout_s)
        return Lease(lease_id=lease_id, ttl_s=ttl_s)

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        check_write(lease_id=lease_id)

        def renew(db: sqlite3.Connection) -> float:
            ttl_s = _ttl_s(db, lease_id)
            db.execute("UPDATE leases SET deadline_s = ? WHERE lease_id = ?", (self._clock() + ttl_s, lease_id))
            return ttl_s

        return self._write(renew, timeout_s)

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        check_write(lease_id=lease_id)
        self._write(lambda db: _end_lease(db, lease_id), timeout_s)

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        stored = self.namespace.stored(key)
        found, _ = self.read(lambda db: _row(db, stored), timeout_s)
        return None if found is None else self.entry(found)

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        stored = self.namespace.stored(key)
        check_write(value=value, lease_id=lease_id, expected=expected)

        def put(db: sqlite3.Connection) -> int:
            found = _row(db, stored)
            _check(stored, expected, found)
            if lease_id is not None:
                _ttl_s(db, lease_id)
            revision = _record(db, [(stored, value, lease_id)])
            db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (stored, value, revision, lease_id))
            return revision

        return self._write(put, timeout_s)

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self.namespace.stored(key)
        check_write(expected=expected)

        def delete(db: sqlite3.Connection) -> bool:
            if (found := _row(db, stored)) is None:
                return False
            _check(stored, expected, found)
            _record(db, [(stored, None, None)])
            db.execute("DELETE FROM entries WHERE key = ?", (stored,))
            return True

        return self._write(delete, timeout_s)

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        bounds = self.namespace.bounds(prefix)

        def read(db: sqlite3.Connection) -> Snapshot:
            rows = db.execute("SELECT * FROM entries WHERE key >= ? AND key < ? ORDER BY key", bounds)
            identity, _, revision, _ = _state(db)
            return Snapshot(revision=revision, entries=tuple(map(self.entry, rows)), identity=identity)

        return self.read(read, timeout_s)[0]

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> LocalWatch:
        self.file.check_open()
        return LocalWatch(self, prefix, after=after, identity=identity)

    def close(self) -> None:
        self.file.close()

    def read(self, body: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> tuple[ResultT, float]:
        """What `body` reads at one moment, after the leases that are over have ended; and for how long none will be."""

        def look(db: sqlite3.Connection) -> tuple[ResultT, float]:
            first: float | None = db.execute("SELECT min(deadline_s) FROM leases").fetchone()[0]
            first = math.inf if first is None else first
            return body(db), first - self._clock() if _state(db)[1] == self._boot_id else 0.0

        found, left_s = self.file.transact("DEFERRED", look, timeout_s)  # waits for no writer; to end a lease it does
        return (found, left_s) if left_s > 0 else (self._write(body, timeout_s), 0.0)

    def _write(self, body: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> ResultT:
        """What `body` returns; its changes are written all together, after the ends of leases; none if it raises."""

        def change(db: sqlite3.Connection) -> ResultT:
            now = self._clock()
            if _state(db)[1] != self._boot_id:  # after a reboot all leases are over
                db.execute("UPDATE state SET boot_id = ?", (self._boot_id,))
                now = math.inf
            over = "SELECT lease_id FROM leases WHERE deadline_s <= ? ORDER BY deadline_s, lease_id"
            for (lease_id,) in db.execute(over, (now,)).fetchall():
                _end_lease(db, lease_id)
            return body(db)

        return self.file.transact("IMMEDIATE", change, timeout_s)

    def entry(self, row: _Row) -> Entry:
        """A row, as callers know it."""
        key, value, revision, lease_id = row
        return Entry(key=self.namespace.key(key), value=value or b"", revision=revision, lease_id=lease_id)


class LocalWatch(Watch):
    """Changes below a prefix: reads the log 20 times a second, and ends leases when they are over."""

    def __init__(self, store: LocalStore, prefix: str, *, after: int, identity: str) -> None:
        super().__init__(store.url)
        self._store = store
        self._first, self._end = store.namespace.bounds(prefix)
        self._after, self._identity = after, identity

    def _check_open(self) -> None:
        if self._store.file.is_closed:
            self.close()
        super()._check_open()

    def _fetch(self, until: float) -> None:
        _, left_s = self._store.read(self._take, None)
        if not self._batches:
            self._closing.wait(max(0.0, min(left_s, _POLL_S, until - time.monotonic())))

    def _take(self, db: sqlite3.Connection) -> None:
        identity, _, revision, _ = _state(db)
        if self._identity not in {"", identity}:
            raise StoreResetError("the store's file was deleted or replaced: start over", url=self._store.url)
        if self._after > revision:
            text = "the store has a lower revision than was seen before: it was wiped"
            raise StoreResetError(text, after=self._after, revision=revision)
        if self._after < revision:
            compacted = db.execute("SELECT min(revision) FROM log").fetchone()[0] - 1
            if self._after < compacted:
                text = "the store no longer keeps what followed this revision; take a snapshot"
                raise CompactedError(text, after=self._after, compacted=compacted)
        wanted = "SELECT * FROM log WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, rowid"
        rows: list[_Row] = db.execute(wanted, (self._after, self._first, self._end)).fetchall()
        for of_batch, changed in groupby(rows, key=lambda row: row[2]):
            self._batches.append(Batch(revision=of_batch, events=tuple(map(self._event, changed))))
        self._identity, self._after = identity, revision

    def _event(self, row: _Row) -> Event:
        return Event(kind="delete" if row[1] is None else "put", **asdict(self._store.entry(row)))


def _state(db: sqlite3.Connection) -> tuple[str, str, int, int]:
    """Identity, boot, revision, and bytes in the log."""
    found: tuple[str, str, int, int] = db.execute("SELECT * FROM state").fetchone()
    return found


def _row(db: sqlite3.Connection, key: bytes) -> Any:
    return db.execute("SELECT * FROM entries WHERE key = ?", (key,)).fetchone()


def _check(key: bytes, expected: int | None, found: _Row | None) -> None:
    revision = 0 if found is None else found[2]
    if expected is not None and expected != revision:
        raise revision_conflict(key, expected, revision)


def _ttl_s(db: sqlite3.Connection, lease_id: int) -> float:
    found = db.execute("SELECT ttl_s FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
    if found is None:
        raise lease_lost(lease_id)
    return float(found[0])


def _end_lease(db: sqlite3.Connection, lease_id: int) -> None:
    """Remove a lease and, in one revision, its entries. One that is not there is none to remove."""
    db.execute("DELETE FROM leases WHERE lease_id = ?", (lease_id,))
    keys = db.execute("SELECT key FROM entries WHERE lease_id = ? ORDER BY key", (lease_id,)).fetchall()
    if keys:
        _record(db, [(key, None, None) for (key,) in keys])
        db.execute("DELETE FROM entries WHERE lease_id = ?", (lease_id,))


def _record(db: sqlite3.Connection, batch: Sequence[tuple[bytes, bytes | None, int | None]]) -> int:
    """Log these changes as those of the store's next revision, and drop what is too old; returns the revision."""
    _, _, before, log_bytes = _state(db)
    revision = before + 1
    rows = [(key, value, revision, lease_id) for key, value, lease_id in batch]
    db.executemany("INSERT INTO log VALUES (?, ?, ?, ?)", rows)
    log_bytes += sum(len(key) + len(value or b"") for key, value, _ in batch)
    while True:
        oldest, nbytes = db.execute(
            "SELECT revision, sum(length(key) + ifnull(length(value), 0)) FROM log"
            " WHERE revision = (SELECT min(revision) FROM log)"
        ).fetchone()
        if oldest == revision or (oldest > revision - KEPT_REVISIONS and log_bytes <= KEPT_BYTES):
            break
        db.execute("DELETE FROM log WHERE revision = ?", (oldest,))
        log_bytes -= nbytes
    db.execute("UPDATE state SET revision = ?, log_bytes = ?", (revision, log_bytes))
    return revision
