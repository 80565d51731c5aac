"""What the file holds, and every reading and changing of it, each inside a transaction that its caller has begun.

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
from collections.abc import Sequence
from typing import Final, NamedTuple

from ucxx_transport.errors import CompactedError, StoreResetError
from ucxx_transport.membership.store import lease_lost, revision_conflict

APPLICATION_ID: Final = 0x75635374
"""Marks the file as a store of this package (`ucSt`)."""
FORMAT: Final = 2
"""Of the tables; another one is another package version's."""
KEPT_REVISIONS: Final = 10_000
KEPT_BYTES: Final = 16 << 20
"""Of keys and values in the log: a store of small records never meets it."""

_TABLES: Final = """
CREATE TABLE state (store_id TEXT NOT NULL, boot_id TEXT NOT NULL, revision INTEGER NOT NULL,
  log_bytes INTEGER NOT NULL);
CREATE TABLE entries (key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL, lease_id INTEGER);
CREATE INDEX entries_by_lease ON entries (lease_id) WHERE lease_id IS NOT NULL;
CREATE TABLE leases (lease_id INTEGER PRIMARY KEY, ttl_s REAL NOT NULL, deadline_s REAL NOT NULL);
CREATE INDEX leases_by_deadline ON leases (deadline_s);
CREATE TABLE log (key BLOB NOT NULL, value BLOB, revision INTEGER NOT NULL, lease_id INTEGER);
CREATE INDEX log_by_revision ON log (revision)
"""


class State(NamedTuple):
    """The row of `state`."""

    store_id: str
    boot_id: str
    revision: int
    log_bytes: int


class Row(NamedTuple):
    """A row of `entries` or `log`."""

    key: bytes
    value: bytes | None
    revision: int
    lease_id: int | None


def create(db: sqlite3.Connection) -> None:
    """Make the tables of an empty file, of no boot yet."""
    for statement in _TABLES.split(";"):
        db.execute(statement)
    db.execute("INSERT INTO state VALUES (?, '', 0, 0)", (secrets.token_hex(16),))


def state(db: sqlite3.Connection) -> State:
    """The store's state."""
    return State(*db.execute("SELECT * FROM state").fetchone())


def first_deadline(db: sqlite3.Connection, boot_id: str) -> float:
    """When the next lease is over, in seconds of CLOCK_BOOTTIME; infinite: none will be; after a reboot all are."""
    if state(db).boot_id != boot_id:
        return -math.inf
    found: float | None = db.execute("SELECT min(deadline_s) FROM leases").fetchone()[0]
    return math.inf if found is None else found


def row(db: sqlite3.Connection, key: bytes) -> Row | None:
    """One entry."""
    found = db.execute("SELECT * FROM entries WHERE key = ?", (key,)).fetchone()
    return None if found is None else Row(*found)


def rows(db: sqlite3.Connection, first: bytes, end: bytes) -> list[Row]:
    """The entries from `first` on, below `end`, in order."""
    return [
        Row(*line) for line in db.execute("SELECT * FROM entries WHERE key >= ? AND key < ? ORDER BY key", (first, end))
    ]


def changes(db: sqlite3.Connection, first: bytes, end: bytes, *, after: int) -> list[Row]:
    """The changes of keys from `first` on, below `end`, of the revisions after `after`, in order.

    Raises:
        StoreResetError: the store has not got as far as `after`.
        CompactedError: the log begins later than just after `after`.
    """
    revision = state(db).revision
    if after > revision:
        text = "the store has a lower revision than was seen before: it was wiped"
        raise StoreResetError(text, after=after, revision=revision)
    if after == revision:
        return []
    compacted = db.execute("SELECT min(revision) FROM log").fetchone()[0] - 1
    if after < compacted:
        text = "the store no longer keeps what followed this revision; take a snapshot"
        raise CompactedError(text, after=after, compacted=compacted)
    wanted = "SELECT * FROM log WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision, rowid"
    return [Row(*line) for line in db.execute(wanted, (after, first, end))]


def expire(db: sqlite3.Connection, now: float, boot_id: str) -> None:
    """End the leases that are over, in the order of their deadlines; after a reboot all of them are."""
    if state(db).boot_id != boot_id:
        db.execute("UPDATE state SET boot_id = ?", (boot_id,))
        now = math.inf
    over = "SELECT lease_id FROM leases WHERE deadline_s <= ? ORDER BY deadline_s, lease_id"
    for (lease_id,) in db.execute(over, (now,)).fetchall():
        end_lease(db, lease_id)


def add_lease(db: sqlite3.Connection, ttl_s: float, now: float) -> int:
    """A new lease; returns its id, which no lease of this or an earlier store has had."""
    lease_id = secrets.randbelow((1 << 63) - 1) + 1
    db.execute("INSERT INTO leases VALUES (?, ?, ?)", (lease_id, ttl_s, now + ttl_s))
    return lease_id


def renew(db: sqlite3.Connection, lease_id: int, now: float) -> float:
    """Move a lease's deadline; returns its time to live. A LeaseLostError: there is no such lease."""
    ttl_s = _ttl_s(db, lease_id)
    db.execute("UPDATE leases SET deadline_s = ? WHERE lease_id = ?", (now + ttl_s, lease_id))
    return ttl_s


def end_lease(db: sqlite3.Connection, lease_id: int) -> None:
    """Remove a lease and, in one revision, its entries. One that is not there is none to remove."""
    db.execute("DELETE FROM leases WHERE lease_id = ?", (lease_id,))
    keys = db.execute("SELECT key FROM entries WHERE lease_id = ? ORDER BY key", (lease_id,)).fetchall()
    if keys:
        _record(db, [(key, None, None) for (key,) in keys])
        db.execute("DELETE FROM entries WHERE lease_id = ?", (lease_id,))


def put(db: sqlite3.Connection, key: bytes, value: bytes, lease_id: int | None, expected: int | None) -> int:
    """Write an entry; returns its revision.

    Raises:
        ConflictError: the key's revision is not the expected one.
        LeaseLostError: there is no such lease.
    """
    found = row(db, key)
    _check(key, expected, 0 if found is None else found.revision)
    if lease_id is not None:
        _ttl_s(db, lease_id)
    revision = _record(db, [(key, value, lease_id)])
    db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (key, value, revision, lease_id))
    return revision


def delete(db: sqlite3.Connection, key: bytes, expected: int | None) -> bool:
    """Remove an entry; returns whether it was there. A ConflictError: it has another revision than expected."""
    found = row(db, key)
    if found is None:
        return False
    _check(key, expected, found.revision)
    _record(db, [(key, None, None)])
    db.execute("DELETE FROM entries WHERE key = ?", (key,))
    return True


def _check(key: bytes, expected: int | None, revision: int) -> None:
    if expected is not None and expected != revision:
        raise revision_conflict(key, expected, revision)


def _ttl_s(db: sqlite3.Connection, lease_id: int) -> float:
    found = db.execute("SELECT ttl_s FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
    if found is None:
        raise lease_lost(lease_id)
    return float(found[0])


def _record(db: sqlite3.Connection, batch: Sequence[tuple[bytes, bytes | None, int | None]]) -> int:
    """Log these changes as those of the store's next revision, and drop what is too old; returns the revision."""
    before = state(db)
    revision = before.revision + 1
    db.executemany(
        "INSERT INTO log VALUES (?, ?, ?, ?)", [(key, value, revision, lease_id) for key, value, lease_id in batch]
    )
    log_bytes = before.log_bytes + sum(len(key) + len(value or b"") for key, value, _ in batch)
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
