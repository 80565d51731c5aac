"""What the file holds, and every reading and changing of it, each inside a transaction that its caller has begun.

| table     | row                                                                                                 |
|-----------|-----------------------------------------------------------------------------------------------------|
| `state`   | one: the store's identity, the boot its deadlines are of, its revision, and how far the log reaches |
| `entries` | a key, its value, the revision of its last change, its lease                                        |
| `leases`  | a lease, its time to live, its deadline on CLOCK_BOOTTIME                                           |
| `log`     | a change of a key: for watches, the newest revisions only                                           |

Each transaction that changes entries has one revision; a lease that has run out ends in one of its own.
"""

from __future__ import annotations

import math
import secrets
import sqlite3
from itertools import groupby
from typing import Final, NamedTuple

from ucxx_transport.errors import CompactedError, StoreResetError
from ucxx_transport.membership.store import lease_lost, revision_conflict

APPLICATION_ID: Final = 0x75635374
"""Marks the file as a store of this package (`ucSt`)."""
FORMAT: Final = 1
"""Of the tables; another one is another package version's."""
KEPT_REVISIONS: Final = 10_000
KEPT_BYTES: Final = 16 << 20
"""Of keys and values in the log: a store of small records never meets it."""

_TABLES: Final = """
CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), store_id TEXT NOT NULL, boot_id TEXT NOT NULL,
  revision INTEGER NOT NULL, compacted INTEGER NOT NULL, log_bytes INTEGER NOT NULL);
CREATE TABLE entries (key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL, lease_id INTEGER);
CREATE INDEX entries_by_lease ON entries (lease_id) WHERE lease_id IS NOT NULL;
CREATE TABLE leases (lease_id INTEGER PRIMARY KEY, ttl_s REAL NOT NULL, deadline_s REAL NOT NULL);
CREATE INDEX leases_by_deadline ON leases (deadline_s);
CREATE TABLE log (revision INTEGER NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, key BLOB NOT NULL,
  value BLOB NOT NULL, lease_id INTEGER, PRIMARY KEY (revision, position))
"""


class State(NamedTuple):
    """The store at one moment."""

    store_id: str
    boot_id: str
    revision: int
    compacted: int
    log_bytes: int


class Row(NamedTuple):
    """An entry as it is stored."""

    key: bytes
    value: bytes
    revision: int
    lease_id: int | None


class Change(NamedTuple):
    """A line of the log."""

    revision: int
    kind: str
    key: bytes
    value: bytes
    lease_id: int | None


def create(db: sqlite3.Connection, boot_id: str) -> None:
    """Make the tables of an empty file."""
    for statement in _TABLES.split(";"):
        db.execute(statement)
    db.execute("INSERT INTO state VALUES (1, ?, ?, 0, 0, 0)", (secrets.token_hex(16), boot_id))


def state(db: sqlite3.Connection) -> State:
    """The store's state."""
    return State(*db.execute("SELECT store_id, boot_id, revision, compacted, log_bytes FROM state").fetchone())


def first_deadline(db: sqlite3.Connection) -> float | None:
    """When the next lease ends, seconds of CLOCK_BOOTTIME; None: there is no lease."""
    found: float | None = db.execute("SELECT min(deadline_s) FROM leases").fetchone()[0]
    return found


def row(db: sqlite3.Connection, key: bytes) -> Row | None:
    """One entry."""
    found = db.execute("SELECT key, value, revision, lease_id FROM entries WHERE key = ?", (key,)).fetchone()
    return None if found is None else Row(*found)


def rows(db: sqlite3.Connection, first: bytes, end: bytes) -> list[Row]:
    """The entries from `first` on, below `end`, in order."""
    found = db.execute(
        "SELECT key, value, revision, lease_id FROM entries WHERE key >= ? AND key < ? ORDER BY key", (first, end)
    )
    return [Row(*line) for line in found]


def changes(
    db: sqlite3.Connection, first: bytes, end: bytes, *, after: int, limit_bytes: int
) -> tuple[int, list[list[Change]]]:
    """Revisions after `after` that changed keys from `first` on, below `end`: whole ones, in order.

    Args:
        db: in a transaction, so that the state and the log are of one moment.
        first: the first key.
        end: the key below which they lie.
        after: a revision.
        limit_bytes: of keys and values; the revision that passes it is the last one that is given.

    Returns:
        The revision up to which the log was read, and the changes of each revision.

    Raises:
        StoreResetError: the store has not got as far as `after`.
        CompactedError: the log begins later than just after `after`.
    """
    now = state(db)
    if after > now.revision:
        raise StoreResetError(
            "the store has a lower revision than was seen before: it was wiped", after=after, revision=now.revision
        )
    if after < now.compacted:
        raise CompactedError(
            "the store no longer keeps what followed this revision; take a snapshot",
            after=after,
            compacted=now.compacted,
        )
    lines = db.execute(
        "SELECT revision, kind, key, value, lease_id FROM log WHERE revision > ? AND key >= ? AND key < ?"
        " ORDER BY revision, position",
        (after, first, end),
    )
    batches: list[list[Change]] = []
    nbytes = 0
    for revision, group in groupby((Change(*line) for line in lines), key=lambda change: change.revision):
        batches.append(list(group))
        nbytes += sum(len(change.key) + len(change.value) for change in batches[-1])
        if nbytes >= limit_bytes:
            return revision, batches
    return now.revision, batches  # changes of other keys have been passed over, and may be compacted


def expire(db: sqlite3.Connection, now: float, boot_id: str) -> None:
    """End the leases that are over, in the order of their deadlines; after a reboot all of them are."""
    if state(db).boot_id != boot_id:
        db.execute("UPDATE state SET boot_id = ?", (boot_id,))
        now = math.inf
    due = db.execute("SELECT lease_id FROM leases WHERE deadline_s <= ? ORDER BY deadline_s, lease_id", (now,))
    ended = [lease_id for (lease_id,) in due]
    for lease_id in ended:
        end_lease(db, lease_id)


def add_lease(db: sqlite3.Connection, ttl_s: float, now: float) -> int:
    """A new lease; returns its id, which no lease of this or an earlier store has had."""
    lease_id = secrets.randbelow((1 << 63) - 1) + 1
    db.execute("INSERT INTO leases VALUES (?, ?, ?)", (lease_id, ttl_s, now + ttl_s))
    return lease_id


def renew(db: sqlite3.Connection, lease_id: int, now: float) -> float:
    """Move a lease's deadline; returns its time to live. A LeaseLostError: there is no such lease."""
    found = db.execute("SELECT ttl_s FROM leases WHERE lease_id = ?", (lease_id,)).fetchone()
    if found is None:
        raise lease_lost(lease_id)
    ttl_s: float = found[0]
    db.execute("UPDATE leases SET deadline_s = ? WHERE lease_id = ?", (now + ttl_s, lease_id))
    return ttl_s


def end_lease(db: sqlite3.Connection, lease_id: int) -> None:
    """Remove a lease and, in one revision, its entries. One that is not there is none to remove."""
    keys = [key for (key,) in db.execute("SELECT key FROM entries WHERE lease_id = ? ORDER BY key", (lease_id,))]
    db.execute("DELETE FROM leases WHERE lease_id = ?", (lease_id,))
    if keys:
        revision = state(db).revision + 1
        db.execute("DELETE FROM entries WHERE lease_id = ?", (lease_id,))
        _record(db, [Change(revision, "delete", key, b"", None) for key in keys])


def put(db: sqlite3.Connection, key: bytes, value: bytes, *, lease_id: int | None, expected: int | None) -> int:
    """Write an entry; returns the revision of it.

    Raises:
        ConflictError: the key's revision is not the expected one.
        LeaseLostError: there is no such lease.
    """
    found = row(db, key)
    revision_now = 0 if found is None else found.revision
    if expected is not None and expected != revision_now:
        raise revision_conflict(key, expected, revision_now)
    if lease_id is not None and not db.execute("SELECT 1 FROM leases WHERE lease_id = ?", (lease_id,)).fetchone():
        raise lease_lost(lease_id)
    revision = state(db).revision + 1
    db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (key, value, revision, lease_id))
    _record(db, [Change(revision, "put", key, value, lease_id)])
    return revision


def delete(db: sqlite3.Connection, key: bytes, *, expected: int | None) -> bool:
    """Remove an entry; returns whether it was there. A ConflictError: it has another revision than expected."""
    found = row(db, key)
    if found is None:
        return False
    if expected is not None and expected != found.revision:
        raise revision_conflict(key, expected, found.revision)
    revision = state(db).revision + 1
    db.execute("DELETE FROM entries WHERE key = ?", (key,))
    _record(db, [Change(revision, "delete", key, b"", None)])
    return True


def _record(db: sqlite3.Connection, batch: list[Change]) -> None:
    """Write the changes of one new revision into the log, make it the store's, and drop what is too old."""
    revision = batch[0].revision
    db.executemany(
        "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)",
        [(revision, position, *change[1:]) for position, change in enumerate(batch)],
    )
    nbytes = sum(len(change.key) + len(change.value) for change in batch)
    db.execute("UPDATE state SET revision = ?, log_bytes = log_bytes + ?", (revision, nbytes))
    _trim(db, state(db))


def _trim(db: sqlite3.Connection, now: State) -> None:
    floor = max(now.compacted, now.revision - KEPT_REVISIONS)
    sizes = db.execute(
        "SELECT revision, sum(length(key) + length(value)) FROM log WHERE revision < ? GROUP BY revision"
        " ORDER BY revision",
        (now.revision,),
    )
    dropped = 0
    if floor > now.compacted or now.log_bytes > KEPT_BYTES:
        for revision, nbytes in sizes:
            if revision > floor and now.log_bytes - dropped <= KEPT_BYTES:
                break
            dropped += nbytes
            floor = max(floor, revision)
    if floor > now.compacted:
        db.execute("DELETE FROM log WHERE revision <= ?", (floor,))
        db.execute("UPDATE state SET compacted = ?, log_bytes = log_bytes - ?", (floor, dropped))
